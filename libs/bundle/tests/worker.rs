//! The worker as a real process: this program starts itself.
fn main() {}
