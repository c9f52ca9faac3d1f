//! Processors: their registers at boot ([`regs`]), their threads ([`run`]), how all of them are stopped and let go
//! ([`gate`]) and what a snapshot keeps of one ([`state`]).

mod digits;
pub mod gate;
mod kick;
pub mod regs;
pub mod run;
pub mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VcpuFd;

use crate::kvm::{KvmError, Vm};

/// One processor. The thread that runs it holds the lock while the guest may run, and lets go of it while it stands
/// at the [`gate::Gate`]; so whoever gets the lock may read and write registers.
#[derive(Clone)]
pub struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    index: u8,
}

impl Vcpu {
    /// Makes processor number `index` of `vm`.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn new(vm: &Vm, index: u8) -> Result<Self, KvmError> {
        Ok(Self { fd: Arc::new(Mutex::new(vm.create_vcpu(index)?)), index })
    }

    /// Number and APIC id.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// The processor, once it stands still.
    pub fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
