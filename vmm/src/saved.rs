//! A machine as it is saved, and a saved one on its way back.
//!
//! ```text
//!   paused machine ──Machine::save()──> fingerprint + sections ──RAM snapshot, registry──> state file
//!                                                                                              │ Saved::read   hostile from here
//!   machine from the same configuration <──Machine::restore()── sections <── Saved::check ─────┘
//! ```
//!
//! A machine is built in one way, whether it boots or goes on: restoring is what happens to a built machine instead of
//! loading a kernel. What must be known before it is built (sizes, which console reads, what the guest was told of its
//! processor) is read first; every other section is looked at behind the last wall. A section that is refused leaves a
//! machine that must not run: the process ends.

use std::fs::File;
use std::sync::Arc;

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;
use ovms_config::vm::VmConfig;
use ovms_state::{
    CpuidEntry, DiskPrint, Fingerprint, Head, Incompatible, Persist, Section, SnapshotError, StateError, StateFile,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::GuestMemoryError;

use crate::clock::{self, Clock};
use crate::kvm::{failed, KvmError, Vm};
use crate::memory::Ram;
use crate::vcpu::state::{MsrError, VcpuError, VcpuPart};
use crate::vcpu::Vcpu;
use crate::wiring::parts::{PartError, Sections};
use crate::wiring::{Devices, InputOwner};

/// Kind of the section with what is nobody's part.
const KIND: &str = "machine";
const VERSION: u32 = 1;

/// KVM's capabilities that saved state relies on, as a fingerprint names them. The last one is needed only where clock
/// rates differ.
const CAPABILITIES: [(Cap, &str); 9] = [
    (Cap::SplitIrqchip, "split-irqchip"),
    (Cap::MpState, "mp-state"),
    (Cap::VcpuEvents, "vcpu-events"),
    (Cap::Debugregs, "debugregs"),
    (Cap::Xsave, "xsave"),
    (Cap::Xcrs, "xcrs"),
    (Cap::AdjustClock, "adjust-clock"),
    (Cap::TscDeadlineTimer, "tsc-deadline-timer"),
    (Cap::TscControl, "tsc-scaling"),
];

/// Why a machine cannot be saved.
#[derive(Debug, Error)]
pub enum SaveError {
    /// KVM refuses.
    #[error("the virtual machine's state cannot be read")]
    Kvm(#[from] KvmError),
    /// A part refuses.
    #[error("a part of the machine cannot be saved")]
    Part(#[from] StateError),
}

/// Why a machine cannot be restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The file is no state file, or a damaged one.
    #[error("the state of the RAM snapshot cannot be read")]
    Read(#[from] SnapshotError),
    /// The host lacks something.
    #[error("this host cannot go on with the RAM snapshot")]
    Incompatible(#[from] Incompatible),
    /// The configuration is of another machine.
    #[error("the RAM snapshot was taken of a machine with {needed} {what}, this one has {found}")]
    Size {
        /// What is counted.
        what: &'static str,
        /// In the configuration.
        found: u64,
        /// In the snapshot.
        needed: u64,
    },
    /// A processor that says more than one can.
    #[error("the RAM snapshot's processor has {0} CPUID entries, more than {KVM_MAX_CPUID_ENTRIES}")]
    Cpuid(usize),
    /// A section does not fit.
    #[error("the RAM snapshot does not fit this machine")]
    Part(#[from] PartError),
    /// KVM refuses.
    #[error("the virtual machine's state cannot be set")]
    Kvm(#[from] KvmError),
    /// The generation id has no place.
    #[error("the VM generation id cannot be written to guest memory")]
    GenerationId(#[source] GuestMemoryError),
    /// A processor of the snapshot has what this host's do not.
    #[error("this host cannot go on with processor {index} of the RAM snapshot")]
    Processor {
        /// Which.
        index: u8,
        /// What it lacks.
        #[source]
        source: MsrError,
    },
}

impl RestoreError {
    /// The snapshot may well be sound, but it is not for this host or this configuration.
    pub fn is_incompatible(&self) -> bool {
        matches!(self, Self::Incompatible(_) | Self::Size { .. } | Self::Processor { .. })
    }
}

#[derive(Serialize, Deserialize)]
struct MachineV1 {
    /// The console that the guest's kernel reads: its command line, which said so, is long gone.
    input: InputOwner,
}

/// Reads everything of a machine that stands with its devices paused.
pub(crate) fn save(
    vm: &Vm,
    vcpus: &[Vcpu],
    devices: &Devices,
    cpuid: &[CpuidEntry],
) -> Result<(Fingerprint, Vec<Section>), SaveError> {
    // The clock first: what comes after it is time that the guest has not seen.
    let clock = Clock::read(vm)?;
    let known: Arc<[u32]> = vm.msr_indices()?.into();
    let machine = MachineV1 { input: devices.input_owner };
    let mut sections = vec![Section::encode(KIND, VERSION, &machine)?, clock.save()?];
    for vcpu in vcpus {
        sections.push(VcpuPart::new(vcpu.clone(), Arc::clone(&known)).save()?);
    }
    sections.extend(devices.save()?);
    let mut fingerprint = host(vm, vcpus, cpuid);
    fingerprint.devices = devices.kinds().map(str::to_owned).collect();
    fingerprint.disks = disks(devices);
    fingerprint.taken = clock.real();
    Ok((fingerprint, sections))
}

/// What this host has to offer to a machine whose processors are shown `cpuid`.
pub(crate) fn host(vm: &Vm, vcpus: &[Vcpu], cpuid: &[CpuidEntry]) -> Fingerprint {
    Fingerprint {
        vmm: env!("CARGO_PKG_VERSION").to_owned(),
        cpuid: cpuid.to_vec(),
        capabilities: vm.capabilities(&CAPABILITIES),
        tsc_khz: vcpus.first().map_or(0, |vcpu| vcpu.lock().get_tsc_khz().unwrap_or(0)),
        ..Fingerprint::default()
    }
}

fn disks(devices: &Devices) -> Vec<DiskPrint> {
    let print = |disk: &Arc<ovms_disk::Stack>| DiskPrint { size: disk.size(), read_only: disk.is_read_only() };
    devices.disks.iter().map(print).collect()
}

/// CPUID as a fingerprint holds it.
pub(crate) fn print_of(cpuid: &CpuId) -> Vec<CpuidEntry> {
    let print = |entry: &kvm_cpuid_entry2| CpuidEntry {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    };
    cpuid.as_slice().iter().map(print).collect()
}

/// The unpacked state of a RAM snapshot. Hostile.
#[derive(Debug)]
pub struct Saved {
    head: Head,
    sections: Vec<Section>,
    input: InputOwner,
}

impl Saved {
    /// Reads `file` and compares it with `config`.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn read(file: &File, config: &VmConfig) -> Result<Self, RestoreError> {
        let (head, sections) = StateFile::read(file)?;
        let sizes = [
            ("vCPUs", u64::from(config.vcpus), u64::from(head.vcpus)),
            ("bytes of memory", config.memory, head.memory),
        ];
        for (what, found, needed) in sizes {
            if found != needed {
                return Err(RestoreError::Size { what, found, needed });
            }
        }
        if head.fingerprint.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(RestoreError::Cpuid(head.fingerprint.cpuid.len()));
        }
        let mut parts = Sections::new(&sections)?;
        let machine: MachineV1 = decode(parts.take(KIND)?)?;
        Ok(Self { input: machine.input, head, sections })
    }

    /// The console that the guest reads.
    pub fn input(&self) -> InputOwner {
        self.input
    }

    /// Whether the processors of `host` can do what those of the snapshot could.
    ///
    /// # Errors
    /// [`RestoreError::Incompatible`].
    pub(crate) fn check_host(&self, host: &Fingerprint) -> Result<(), RestoreError> {
        Ok(self.head.check(host)?)
    }

    /// Whether these are the snapshot's devices.
    ///
    /// # Errors
    /// [`RestoreError::Incompatible`].
    pub(crate) fn check_machine(&self, devices: &Devices) -> Result<(), RestoreError> {
        let kinds: Vec<String> = devices.kinds().map(str::to_owned).collect();
        Ok(self.head.fingerprint.check_machine(&kinds, &disks(devices))?)
    }

    /// What the guest was told of its processors.
    pub(crate) fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        let entry = |print: &CpuidEntry| kvm_cpuid_entry2 {
            function: print.function,
            index: print.index,
            flags: print.flags,
            eax: print.eax,
            ebx: print.ebx,
            ecx: print.ecx,
            edx: print.edx,
            ..Default::default()
        };
        self.head.fingerprint.cpuid.iter().map(entry).collect()
    }

    /// Gives a machine that was built for this the saved state: devices first, then the processors and their clock, then
    /// what tells the guest that it is another one now.
    pub(crate) fn restore(&self, vm: &Vm, ram: &Ram, vcpus: &[Vcpu], devices: &Devices) -> Result<(), RestoreError> {
        let mut sections = Sections::new(&self.sections)?;
        sections.take(KIND)?;
        let clock = Clock::load(sections.take(clock::KIND)?).map_err(in_part(clock::KIND))?;
        devices.restore(&mut sections)?;
        let known: Arc<[u32]> = vm.msr_indices()?.into();
        let away = clock.away();
        devices.pm.advance(away);
        let ticks = clock::ticks(away, self.head.fingerprint.tsc_khz);
        for vcpu in vcpus {
            self.set_rate(vcpu)?;
            let part = VcpuPart::new(vcpu.clone(), Arc::clone(&known)).ahead(ticks);
            let kind = part.kind();
            part.apply(sections.take(&kind)?).map_err(|err| match err {
                VcpuError::Msr(source) => RestoreError::Processor { index: vcpu.index(), source },
                VcpuError::State(source) => PartError::Part { kind, source }.into(),
            })?;
        }
        sections.finish()?;
        clock.set(vm, away)?;
        for vcpu in vcpus {
            // Refused by a processor whose guest does not use kvm-clock.
            let _ = vcpu.lock().kvmclock_ctrl();
        }
        devices.bump_generation(ram).map_err(RestoreError::GenerationId)
    }

    /// Gives a processor the snapshot's clock rate. That the host can was checked.
    fn set_rate(&self, vcpu: &Vcpu) -> Result<(), RestoreError> {
        let needed = self.head.fingerprint.tsc_khz;
        let fd = vcpu.lock();
        let found = fd.get_tsc_khz().unwrap_or(0);
        if needed != 0 && found != 0 && needed != found {
            fd.set_tsc_khz(needed).map_err(failed("KVM_SET_TSC_KHZ"))?;
        }
        Ok(())
    }
}

fn decode<T: serde::de::DeserializeOwned>(section: &Section) -> Result<T, RestoreError> {
    Ok(section.decode(KIND, VERSION).map_err(in_part(KIND))?)
}

fn in_part(kind: &str) -> impl FnOnce(StateError) -> PartError + '_ {
    move |source| PartError::Part { kind: kind.to_owned(), source }
}
