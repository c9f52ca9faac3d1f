//! The machine on KVM.
