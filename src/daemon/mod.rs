//! Under construction.

pub mod frames;
pub mod switch;
