//! Under construction.

pub mod edge;
pub mod frames;
pub mod switch;
