//! A whole machine: memory, virtual machine, processors, devices.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::CpuId;
use ovms_config::vm::VmSpec;
use ovms_devices::machine::{EventSink, MachineEvent};
use ovms_devices::threads::Spawner;
use ovms_proto::control::ExitReason;
use thiserror::Error;

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError, Payload};
use crate::cpuid::{self, Topology};
use crate::fds::{FdError, Fds};
use crate::kvm::{failed, KvmError, SupportedCpuid, Vm};
use crate::mailbox::{Mail, Sender};
use crate::memory::Ram;
use crate::report;
use crate::timeline::Recorder;
use crate::vcpu::gate::{Gate, Wanted};
use crate::vcpu::regs::{self, RegsError};
use crate::vcpu::run::{install_handler, Shared, Thread};
use crate::vcpu::Vcpu;
use crate::wiring::{Devices, Environment, WiringError};

/// Why a machine cannot be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// A descriptor is missing.
    #[error("the configuration and its descriptors do not fit")]
    Fd(#[from] FdError),
    /// KVM refuses.
    #[error("the virtual machine cannot be made")]
    Kvm(#[from] KvmError),
    /// A device fails.
    #[error("the machine's devices cannot be made")]
    Wiring(#[from] WiringError),
    /// A thread cannot be had.
    #[error("the processors cannot be started")]
    Threads(#[source] io::Error),
    /// The tables fail.
    #[error("the machine cannot be described to its guest")]
    Acpi(#[from] AcpiError),
    /// The kernel fails.
    #[error("the kernel cannot be booted")]
    Boot(#[from] BootError),
    /// Registers fail.
    #[error("processor {0} cannot be set up")]
    Registers(u8, #[source] RegsError),
}

/// What a kind of thread does first: installs its seccomp filter.
#[derive(Clone)]
pub struct ThreadStart {
    /// For device threads.
    pub device: Spawner,
    /// For vCPU threads.
    pub vcpu: Arc<dyn Fn() + Send + Sync>,
}

/// A machine whose processors stand until it is told to run.
pub struct Machine {
    ram: Ram,
    vcpus: Vec<Vcpu>,
    threads: Vec<Thread>,
    shared: Arc<Shared>,
    devices: Devices,
    /// The devices are paused, and have to be told when the processors go on.
    paused: AtomicBool,
}

impl Machine {
    /// Builds the machine up to the point where it only lacks a state: processors and devices are as after power-on,
    /// their threads wait, memory is empty.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn build(
        spec: &VmSpec,
        fds: &mut Fds,
        ram: Ram,
        mail: Sender,
        start: &ThreadStart,
        timeline: &mut Recorder,
    ) -> Result<Self, BuildError> {
        let config = spec.config();
        let count = config.vcpus as u8;
        let device = fds.take(config.kvm)?;
        let cpuid = SupportedCpuid::ask(&device).map_err(BuildError::Threads)?;
        let vm = Arc::new(Vm::new(device, &ram)?);
        let vcpus = (0..count).map(|index| Vcpu::new(&vm, index)).collect::<Result<Vec<_>, _>>()?;
        timeline.passed("kvm");
        let gate = Arc::new(Gate::new(vcpus.len()));
        let environment = Environment {
            vm: &vm,
            ram: &ram,
            spec,
            spawner: &start.device,
            events: event_sink(mail.clone(), Arc::clone(&gate)),
        };
        let devices = Devices::new(&environment, fds)?;
        timeline.passed("devices");
        let shared = Arc::new(Shared {
            gate,
            ports: devices.ports.clone(),
            mmio: devices.mmio.clone(),
            ioapic: Arc::clone(&devices.ioapic),
            console: Arc::clone(&devices.console),
            mail,
        });
        install_handler().map_err(BuildError::Threads)?;
        let threads = vcpus
            .iter()
            .map(|vcpu| {
                let enter = Arc::clone(&start.vcpu);
                Thread::spawn(vcpu.clone(), Arc::clone(&shared), move || enter())
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(BuildError::Threads)?;
        timeline.passed("threads");
        let paused = AtomicBool::new(false);
        describe_processors(&vm, &vcpus, &cpuid.wait()?)?;
        timeline.passed("cpuid");
        Ok(Self { ram, vcpus, threads, shared, devices, paused })
    }

    /// Gives the machine the state in which it boots `payload`.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn boot(&self, payload: Payload, timeline: &mut Recorder) -> Result<(), BuildError> {
        let count = self.vcpus.len() as u8;
        let rsdp = acpi::write(&self.ram, acpi::Description { vcpus: count })?;
        timeline.passed("acpi");
        let entry = boot::load(&self.ram, payload, rsdp)?;
        timeline.passed("kernel");
        if let Some(first) = self.vcpus.first() {
            let fd = first.lock();
            regs::set_entry(&fd, &self.ram, entry).map_err(|err| BuildError::Registers(first.index(), err))?;
        }
        timeline.passed("registers");
        Ok(())
    }

    /// Lets the processors go, devices first.
    pub fn open(&self) {
        if self.paused.swap(false, Ordering::Relaxed) {
            self.devices.resume();
        }
        self.shared.gate.set(Wanted::Run);
    }

    /// Stops the processors, then the devices. `false`: the guest was gone before.
    pub fn close(&self) -> bool {
        self.shared.gate.set(Wanted::Stand);
        self.kick();
        self.shared.gate.wait_all_standing();
        if self.shared.gate.wanted() != Wanted::Stand {
            return false;
        }
        self.devices.pause();
        self.paused.store(true, Ordering::Relaxed);
        true
    }

    /// Ends the processors for good and writes out what the guest has left behind, at the latest until `deadline`.
    pub fn finish(&self, deadline: Instant) {
        self.shared.gate.set(Wanted::Finish);
        self.kick();
        self.devices.finish(deadline);
    }

    fn kick(&self) {
        for thread in &self.threads {
            thread.kick();
        }
        self.shared.console.kick();
    }

    /// The machine's devices.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Guest exits since start, all processors together.
    pub fn exits(&self) -> u64 {
        self.threads.iter().map(Thread::exits).sum()
    }
}

/// Gives each processor what it says about itself and what firmware would have set.
fn describe_processors(vm: &Vm, vcpus: &[Vcpu], supported: &CpuId) -> Result<(), BuildError> {
    let topology = Topology { vcpus: vcpus.len() as u8, tsc_deadline: vm.has_tsc_deadline_timer() };
    for vcpu in vcpus {
        let cpuid = cpuid::for_vcpu(supported, topology, vcpu.index())?;
        let fd = vcpu.lock();
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        regs::set_common(&fd).map_err(|err| BuildError::Registers(vcpu.index(), err))?;
    }
    Ok(())
}

/// Where devices report what ends the machine. The reporting processor stops before its next instruction; the owner
/// stops the others.
fn event_sink(mail: Sender, gate: Arc<Gate>) -> EventSink {
    Arc::new(move |event: MachineEvent| {
        let reason = match event {
            MachineEvent::PowerOff => ExitReason::PowerOff,
            MachineEvent::Reset(source) => {
                tracing::info!(?source, "the guest reset the machine");
                ExitReason::Reset
            }
            MachineEvent::GuestPanic => ExitReason::Panic,
            MachineEvent::CrashLoaded => {
                tracing::warn!("the guest's kernel panicked, its crash kernel takes over");
                return;
            }
        };
        gate.set(Wanted::Finish);
        mail.send(Mail::Exit(reason));
    })
}

/// One line for a failed build.
pub fn describe(err: &BuildError) -> String {
    report::chain(err)
}
