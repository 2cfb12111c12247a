//! `xl-colo`.
#![forbid(unsafe_code)]

fn main() {}
