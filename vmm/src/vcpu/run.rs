//! A processor's thread: enters the guest, serves its exits from the buses, stands at the gate, ends.
//!
//! ```text
//!   loop: gate ──Stand──> complete the last exit, unlock, stand ──┐
//!          │  ^───────────────────────────────────────────────────┘
//!          ├──Run────> KVM_RUN ─> I/O, MMIO, EOI: serve ─> console full? wait
//!          │                 └──> shutdown, internal error: report and end
//!          └──Finish─> end
//! ```

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use ovms_devices::bus::Bus;
use ovms_devices::console::ByteSink;
use ovms_devices::legacy::Ioapic;
use ovms_proto::control::ExitReason;
use thiserror::Error;
use vmm_sys_util::errno;

use super::gate::{Gate, Wanted};
use super::kick::{self, ImmediateExit};
use super::Vcpu;
use crate::mailbox::{Mail, Sender};

pub use super::kick::install_handler;

/// Bytes of stack of a processor's thread; the deepest path, an MMIO exit into PCI configuration space, needs a few
/// KiB.
const STACK_BYTES: usize = 256 << 10;

/// What all processors of a machine share.
pub struct Shared {
    /// Where processors wait.
    pub gate: Arc<Gate>,
    /// Devices on I/O ports.
    pub ports: Bus,
    /// Devices in the address space.
    pub mmio: Bus,
    /// Is told of interrupts that a processor is done with.
    pub ioapic: Arc<Ioapic>,
    /// The console: a processor waits when it is full.
    pub console: Arc<dyn ByteSink>,
    /// Where the owner hears of what happens.
    pub mail: Sender,
}

/// Why a processor cannot go on.
#[derive(Debug, Error)]
pub enum RunError {
    /// KVM refuses to run it.
    #[error("KVM cannot run processor {0}")]
    Run(u8, #[source] errno::Error),
    /// KVM met something it cannot emulate.
    #[error("processor {index} met KVM internal error {suberror} at {rip:#x}: {}", suberror_text(*suberror))]
    Internal {
        /// Which processor.
        index: u8,
        /// Kind of error (`KVM_INTERNAL_ERROR_*` of include/uapi/linux/kvm.h).
        suberror: u32,
        /// Its instruction pointer.
        rip: u64,
    },
    /// The hardware refused the processor's state.
    #[error("the hardware refuses to enter processor {index}: reason {reason:#x}")]
    Entry {
        /// Which processor.
        index: u8,
        /// As the hardware gives it.
        reason: u64,
    },
    /// An exit that this machine has no use for.
    #[error("processor {0} left the guest for an unknown reason: {1}")]
    Unexpected(u8, String),
    /// The guest touched memory that the host cannot give.
    #[error("processor {0} touched guest memory at {1:#x} that the host cannot give")]
    Memory(u8, u64),
    /// A defect of ours.
    #[error("the thread of processor {0} panicked")]
    Panicked(u8),
}

fn suberror_text(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "an exception while another was being delivered",
        3 => "a fault while an event was being delivered",
        4 => "an exit that KVM does not know",
        _ => "unknown",
    }
}

/// How one stay in the guest ended.
enum Step {
    /// Go on.
    Continue,
    /// A kick: look at the gate.
    Interrupted,
    /// The machine is over.
    Ended(ExitReason),
}

/// A processor's thread, as its owner sees it.
pub struct Thread {
    handle: JoinHandle<()>,
    immediate_exit: ImmediateExit,
    exits: Arc<AtomicU64>,
}

impl Thread {
    /// Starts the thread of `vcpu`; it stands at the gate until the owner opens it. `enter` runs on it first.
    ///
    /// # Errors
    /// The system has no thread or no mapping to give.
    pub fn spawn(vcpu: Vcpu, shared: Arc<Shared>, enter: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let immediate_exit = ImmediateExit::map(&vcpu.lock())?;
        let exits = Arc::new(AtomicU64::new(0));
        let counter = exits.clone();
        let name = format!("vcpu{}", vcpu.index());
        let handle = Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
            enter();
            let index = vcpu.index();
            let (mail, gate) = (shared.mail.clone(), Arc::clone(&shared.gate));
            let thread = Runner { vcpu, shared, exits: counter };
            let ended = catch_unwind(AssertUnwindSafe(|| thread.run()))
                .unwrap_or_else(|_| Some(fault(&RunError::Panicked(index))));
            if let Some(reason) = ended {
                // Whoever waits for all processors to stand must not wait for this one.
                gate.set(Wanted::Finish);
                mail.send(Mail::Exit(reason));
            }
        })?;
        Ok(Self { handle, immediate_exit, exits })
    }

    /// Makes the processor leave the guest and look at the gate.
    pub fn kick(&self) {
        self.immediate_exit.set();
        // SAFETY: the handle has not been joined, so its thread id is valid, even if the thread has ended.
        unsafe { libc::pthread_kill(self.handle.as_pthread_t(), kick::signal()) };
    }

    /// How often the guest left to the VMM so far.
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }
}

fn fault(err: &RunError) -> ExitReason {
    ExitReason::Fault { message: crate::report::chain(err) }
}

struct Runner {
    vcpu: Vcpu,
    shared: Arc<Shared>,
    exits: Arc<AtomicU64>,
}

impl Runner {
    /// Runs until the gate says to end (`None`) or the machine is over.
    fn run(&self) -> Option<ExitReason> {
        loop {
            match self.shared.gate.wanted() {
                Wanted::Finish => return None,
                Wanted::Stand => self.shared.gate.stand(),
                Wanted::Run => {
                    if let Some(reason) = self.run_guest() {
                        return Some(reason);
                    }
                }
            }
        }
    }

    /// Runs the guest, with the processor locked, until the gate closes.
    fn run_guest(&self) -> Option<ExitReason> {
        let mut fd = self.vcpu.lock();
        while self.shared.gate.wanted() == Wanted::Run {
            match self.step(&mut fd) {
                Ok(Step::Continue) => self.wait_for_console(),
                // The flag is taken back before the gate is looked at again: a kick that comes later sets it anew.
                Ok(Step::Interrupted) => fd.set_kvm_immediate_exit(0),
                Ok(Step::Ended(reason)) => return Some(reason),
                Err(err) => return Some(fault(&err)),
            }
        }
        match self.shared.gate.wanted() {
            Wanted::Finish => None,
            _ => self.complete_last_exit(&mut fd),
        }
    }

    /// KVM completes an I/O instruction at the next entry; a processor that stands must have none in between, or its
    /// registers are from before the instruction and its device's from after.
    fn complete_last_exit(&self, fd: &mut VcpuFd) -> Option<ExitReason> {
        fd.set_kvm_immediate_exit(1);
        let ended = loop {
            match self.step(fd) {
                Ok(Step::Continue) => {}
                Ok(Step::Interrupted) => break None,
                Ok(Step::Ended(reason)) => break Some(reason),
                Err(err) => break Some(fault(&err)),
            }
        };
        fd.set_kvm_immediate_exit(0);
        ended
    }

    fn wait_for_console(&self) {
        let console = &self.shared.console;
        if console.is_full() {
            console.wait_room(&|| self.shared.gate.wanted() != Wanted::Run);
        }
    }

    /// Enters the guest once and serves its exit.
    fn step(&self, fd: &mut VcpuFd) -> Result<Step, RunError> {
        let index = self.vcpu.index();
        let exit = match fd.run() {
            Ok(exit) => exit,
            Err(err) => {
                return match err.errno() {
                    libc::EINTR => Ok(Step::Interrupted),
                    // A processor that waits for INIT was woken.
                    libc::EAGAIN => Ok(Step::Continue),
                    _ => Err(RunError::Run(index, err)),
                };
            }
        };
        if self.exits.fetch_add(1, Ordering::Relaxed) == 0 && index == 0 {
            self.shared.mail.send(Mail::FirstExit);
        }
        match exit {
            VcpuExit::IoOut(port, data) => {
                self.shared.ports.write(u64::from(port), data);
            }
            VcpuExit::IoIn(port, data) => {
                self.shared.ports.read(u64::from(port), data);
            }
            VcpuExit::MmioWrite(address, data) => {
                self.shared.mmio.write(address, data);
            }
            VcpuExit::MmioRead(address, data) => {
                self.shared.mmio.read(address, data);
            }
            VcpuExit::IoapicEoi(vector) => self.shared.ioapic.eoi(vector),
            VcpuExit::Shutdown => return Ok(Step::Ended(ExitReason::TripleFault)),
            VcpuExit::Intr | VcpuExit::Hlt => {}
            VcpuExit::InternalError => {
                let suberror = internal_suberror(fd.get_kvm_run());
                let rip = fd.get_regs().map_or(0, |regs| regs.rip);
                return Err(RunError::Internal { index, suberror, rip });
            }
            VcpuExit::FailEntry(reason, _) => return Err(RunError::Entry { index, reason }),
            VcpuExit::MemoryFault { gpa, .. } => return Err(RunError::Memory(index, gpa)),
            other => return Err(RunError::Unexpected(index, format!("{other:?}"))),
        }
        Ok(Step::Continue)
    }
}

fn internal_suberror(run: &kvm_run) -> u32 {
    // SAFETY: the exit reason says that this is the union's live field, and any bytes make a valid u32.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}
