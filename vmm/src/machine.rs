//! A whole machine: memory, virtual machine, processors, devices.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc};
use std::time::Instant;

use kvm_bindings::kvm_cpuid_entry2;
use ovms_config::vm::{VmConfig, VmSpec};
use ovms_devices::log_limit::LogLimit;
use ovms_devices::machine::{EventSink, MachineEvent};
use ovms_devices::threads::Spawner;
use ovms_proto::control::ExitReason;
use ovms_state::{CpuidEntry, Fingerprint, Section};
use thiserror::Error;

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError, Payload};
use crate::cpuid::{self, Topology};
use crate::fds::{FdError, Fds};
use crate::kvm::{self, failed, KvmError, Vm};
use crate::mailbox::{Mail, Sender};
use crate::memory::Ram;
use crate::saved::{self, RestoreError, SaveError, Saved};
use crate::snapshot::Chore;
use crate::timeline::Recorder;
use crate::vcpu::gate::{Gate, Wanted};
use crate::vcpu::regs::{self, RegsError};
use crate::vcpu::run::{install_handler, Shared, Thread};
use crate::vcpu::Vcpu;
use crate::wiring::{Devices, Environment, Hypervisor, WiringError};
use crate::working_set::Watch;

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
    #[error("the threads of the machine cannot be started")]
    Threads(#[source] io::Error),
    /// The tables fail.
    #[error("the machine cannot be described to its guest")]
    Acpi(#[from] AcpiError),
    /// The kernel fails.
    #[error("the kernel cannot be booted")]
    Boot(#[from] BootError),
    /// A snapshot does not fit.
    #[error("the machine cannot go on from its RAM snapshot")]
    Restore(#[from] RestoreError),
    /// Registers fail.
    #[error("processor {0} cannot be set up")]
    Registers(u8, #[source] RegsError),
}

/// What a kind of thread does first, installs its seccomp filter, and what one does before that.
pub struct ThreadStart {
    /// For device threads.
    pub device: Spawner,
    /// For vCPU threads.
    pub vcpu: Arc<dyn Fn() + Send + Sync>,
    /// Runs a chore on a thread that is there anyway and has no filter yet.
    pub beside: Box<dyn Fn(Chore)>,
}

/// A virtual machine without processors and devices, whose memory is on its way: where the MMU is shadowed the kernel takes
/// 0.4 ms for each GiB, and all that is made of a machine asks nothing of it until the processors get their state.
pub struct Base {
    vm: Arc<Vm>,
    ram: Ram,
    supported: Vec<kvm_cpuid_entry2>,
    slots: Slots,
}

impl Base {
    /// Makes it, and has a thread add the memory.
    ///
    /// # Errors
    /// [`BuildError::Fd`], [`BuildError::Kvm`].
    pub fn new(config: &VmConfig, fds: &mut Fds, ram: Ram, start: &ThreadStart) -> Result<Self, BuildError> {
        let device = fds.take(config.kvm)?;
        let supported = kvm::read_supported_cpuid(&fds.take_file(config.cpuid)?)?;
        let vm = Arc::new(Vm::new(device)?);
        let (added, slots) = mpsc::channel();
        let (theirs, memory) = (Arc::clone(&vm), ram.clone());
        (start.beside)(Box::new(move || {
            let _ = added.send(theirs.add_memory(&memory).map(|()| Instant::now()));
        }));
        Ok(Self { vm, ram, supported, slots })
    }
}

/// When the kernel had the memory.
type Slots = mpsc::Receiver<Result<Instant, KvmError>>;

/// A machine whose processors stand until it is told to run.
pub struct Machine {
    slots: Slots,
    vm: Arc<Vm>,
    ram: Ram,
    vcpus: Vec<Vcpu>,
    threads: Vec<Thread>,
    shared: Arc<Shared>,
    devices: Devices,
    /// What the first processor says about itself.
    cpuid: Vec<CpuidEntry>,
    /// Is told when a restored guest runs and when it has ended.
    working_set: Option<Watch>,
    /// The devices are paused, and have to be told when the processors go on.
    paused: AtomicBool,
}

impl Machine {
    /// Builds the machine up to the point where it only lacks a state: processors and devices are as after power-on,
    /// their threads wait, memory is as it was mapped. What is to be restored afterwards says what the processors must
    /// be able to do, and a host that cannot is refused.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn build(
        base: Base,
        spec: &VmSpec,
        fds: &mut Fds,
        mail: Sender,
        start: &ThreadStart,
        saved: Option<&Saved>,
        timeline: &mut Recorder,
    ) -> Result<Self, BuildError> {
        let Base { vm, ram, supported, slots } = base;
        let count = spec.config().vcpus as u8;
        let gate = Arc::new(Gate::new(usize::from(count)));
        let hypervisor: Arc<dyn Hypervisor> = Arc::clone(&vm) as _;
        let environment = Environment {
            hypervisor: &hypervisor,
            ram: &ram,
            spec,
            spawner: &start.device,
            saved,
            events: event_sink(mail.clone(), Arc::clone(&gate)),
        };
        let devices = Devices::new(&environment, fds)?;
        timeline.passed("devices");
        let vcpus = (0..count).map(|index| Vcpu::new(&vm, index)).collect::<Result<Vec<_>, _>>()?;
        timeline.passed("kvm");
        let cpuid = describe_processors(&vm, &vcpus, &supported, saved)?;
        timeline.passed("cpuid");
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
        if let Some(saved) = saved {
            saved.check_machine(&devices)?;
        }
        Ok(Self { slots, vm, ram, vcpus, threads, shared, devices, cpuid, working_set: None, paused })
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
        self.await_memory(timeline)?;
        if let Some(first) = self.vcpus.first() {
            let fd = first.lock();
            regs::set_entry(&fd, &self.ram, entry).map_err(|err| BuildError::Registers(first.index(), err))?;
        }
        timeline.passed("registers");
        Ok(())
    }

    /// Gives the machine the state of `saved`, for which it was built. Its devices stay paused until [`Machine::open`].
    ///
    /// # Errors
    /// [`BuildError::Restore`]; the machine must not run then.
    pub fn restore(&self, saved: &Saved, timeline: &mut Recorder) -> Result<(), BuildError> {
        self.paused.store(true, Ordering::Relaxed);
        self.await_memory(timeline)?;
        saved.restore(&self.vm, &self.ram, &self.vcpus, &self.devices)?;
        timeline.passed("sections");
        Ok(())
    }

    /// Waits until KVM has the memory: a processor's state may refer to it (KVM_SET_SREGS reads the page directory pointers).
    fn await_memory(&self, timeline: &mut Recorder) -> Result<(), BuildError> {
        let panicked = |_| BuildError::Threads(io::Error::other("the thread that adds memory panicked"));
        timeline.passed_at("slots", self.slots.recv().map_err(panicked)??);
        Ok(())
    }

    /// Tells `watch` of the guest's life from now on.
    pub fn watch(&mut self, watch: Watch) {
        self.working_set = Some(watch);
    }

    /// Saves everything but memory and the content of disks. The machine must stand ([`Machine::close`]); it may go on
    /// afterwards.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(&self) -> Result<(Fingerprint, Vec<Section>), SaveError> {
        saved::save(&self.vm, &self.vcpus, &self.devices, &self.cpuid)
    }

    /// Lets the processors go, devices first.
    pub fn open(&self) {
        self.release_devices();
        if let Some(watch) = &self.working_set {
            watch.began();
        }
        self.shared.gate.set(Wanted::Run);
    }

    /// Stops the processors; the devices must stand ([`Machine::hold_devices`]), or a processor may wait for a disk.
    /// `false`: the guest was gone before.
    pub fn close(&self) -> bool {
        self.shared.gate.set(Wanted::Stand);
        self.kick();
        self.shared.gate.wait_all_standing();
        if self.shared.gate.wanted() != Wanted::Stand {
            return false;
        }
        if let Some(watch) = &self.working_set {
            watch.stopped();
        }
        true
    }

    /// Begins to stop the devices while the processors go on, so that these need not stand until a disk has answered, and
    /// waits until `until` for that; whether they stand. Until [`Machine::open`] or [`Machine::release_devices`].
    pub fn hold_devices(&self, until: Instant) -> bool {
        self.paused.store(true, Ordering::Relaxed);
        self.devices.hold(until)
    }

    /// Lets the devices go on.
    pub fn release_devices(&self) {
        if self.paused.swap(false, Ordering::Relaxed) {
            self.devices.resume();
        }
    }

    /// Ends the processors for good.
    pub fn stop(&self) {
        self.shared.gate.set(Wanted::Finish);
        self.kick();
        // What the guest asked for before it ended is still done.
        self.release_devices();
    }

    /// Writes out what the guest has left behind on its console, at the latest until `deadline`.
    pub fn finish(&self, deadline: Instant) {
        self.devices.finish(deadline);
        if let Some(watch) = &self.working_set {
            watch.finish();
        }
    }

    fn kick(&self) {
        for thread in &self.threads {
            thread.kick();
        }
        self.shared.console.kick();
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Its memory.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Number of its processors.
    pub fn vcpus(&self) -> u32 {
        self.vcpus.len() as u32
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

/// Gives each processor what it says about itself, the host's or the snapshot's, and what firmware would have set.
/// Returns what the first one says.
fn describe_processors(
    vm: &Vm,
    vcpus: &[Vcpu],
    supported: &[kvm_cpuid_entry2],
    saved: Option<&Saved>,
) -> Result<Vec<CpuidEntry>, BuildError> {
    let topology = Topology { vcpus: vcpus.len() as u8, tsc_deadline: vm.has_tsc_deadline_timer() };
    let own = saved::print_of(&cpuid::for_vcpu(supported, topology, 0)?);
    let shown = match saved {
        Some(saved) => {
            saved.check_host(&saved::host(vm, vcpus, &own))?;
            saved.cpuid()
        }
        None => supported.to_vec(),
    };
    for vcpu in vcpus {
        let cpuid = cpuid::for_vcpu(&shown, topology, vcpu.index())?;
        let fd = vcpu.lock();
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        regs::set_common(&fd).map_err(|err| BuildError::Registers(vcpu.index(), err))?;
    }
    Ok(saved::print_of(&cpuid::for_vcpu(&shown, topology, 0)?))
}

/// Where devices report what ends the machine. The reporting processor stops before its next instruction; the owner
/// stops the others.
fn event_sink(mail: Sender, gate: Arc<Gate>) -> EventSink {
    let crashes = LogLimit::new();
    Arc::new(move |event: MachineEvent| {
        let reason = match event {
            MachineEvent::PowerOff => ExitReason::PowerOff,
            MachineEvent::Reset(source) => {
                tracing::info!(?source, "the guest reset the machine");
                ExitReason::Reset
            }
            MachineEvent::GuestPanic => ExitReason::Panic,
            // The machine goes on, so a guest can say this for ever.
            MachineEvent::CrashLoaded => {
                if crashes.allows() {
                    tracing::warn!("the guest's kernel panicked, its crash kernel takes over");
                }
                return;
            }
        };
        gate.set(Wanted::Finish);
        mail.send(Mail::Exit(reason));
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mailbox::Mailbox;
    use std::sync::Mutex;

    /// Collects what is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_guest_that_keeps_saying_that_it_crashed_does_not_flood_the_log() {
        let (mail, mailbox) = Mailbox::new().unwrap();
        let gate = Arc::new(Gate::new(1));
        let sink = event_sink(mail, Arc::clone(&gate));
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            (0..10_000).for_each(|_| sink.report(MachineEvent::CrashLoaded))
        });
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().filter(|line| line.contains("crash kernel")).count(), 16, "{text}");
        assert!(mailbox.take().is_empty() && gate.wanted() != Wanted::Finish, "the machine goes on");
    }
}
