//! The integration tests: one binary, a file a behaviour.

mod sim;
mod tidy;
