//! The integration tests: one binary, a file a behaviour.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed, helper or not")]

mod sim;
mod tidy;
