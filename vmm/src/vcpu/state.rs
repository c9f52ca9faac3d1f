//! What a snapshot keeps of a processor.
//!
//! The order of calls is not free: KVM_GET_MP_STATE settles events that are under way, so it comes before registers;
//! events come last on both sides, since registers and the local APIC change them; the TSC-deadline MSR is set after
//! the local APIC that it arms (Documentation/virt/kvm/api.rst).

use std::sync::Arc;

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave, Msrs,
};
use kvm_ioctls::VcpuFd;
use ovms_state::{Persist, Section, StateError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{digits, Vcpu};

const KIND: &str = "vcpu";
const VERSION: u32 = 1;
/// Most MSRs in one call: the kernel refuses more (`MAX_IO_MSRS` of arch/x86/kvm/x86.c is 256).
const MSR_BATCH: usize = 200;
/// Most MSRs that a processor saves: several times what KVM has.
const MAX_MSRS: usize = 4096;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// What a section of a processor says: any words of the sender's that have the form of KVM's structures.
#[derive(Serialize, Deserialize)]
pub struct VcpuV1 {
    #[serde(with = "digits")]
    mp_state: kvm_mp_state,
    #[serde(with = "digits")]
    regs: kvm_regs,
    #[serde(with = "digits")]
    sregs: kvm_sregs,
    #[serde(with = "digits")]
    xsave: kvm_xsave,
    #[serde(with = "digits")]
    xcrs: kvm_xcrs,
    #[serde(with = "digits")]
    debug: kvm_debugregs,
    #[serde(with = "digits")]
    apic: kvm_lapic_state,
    /// Index and value, in the order of the host's list.
    msrs: Vec<(u32, u64)>,
    #[serde(with = "digits")]
    events: kvm_vcpu_events,
}

impl VcpuV1 {
    /// Decodes the section of processor `index`, and looks at nothing in it.
    ///
    /// # Errors
    /// [`StateError`] if it is not one.
    pub fn load(section: &Section, index: u8) -> Result<Self, StateError> {
        if section.kind != kind(index) {
            return Err(StateError::WrongKind { expected: KIND, found: section.kind.clone() });
        }
        Section { kind: KIND.into(), ..section.clone() }.decode(KIND, VERSION)
    }

    /// The section of processor `index`.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be encoded.
    pub fn section(&self, index: u8) -> Result<Section, StateError> {
        Ok(Section { kind: kind(index), ..Section::encode(KIND, VERSION, self)? })
    }
}

fn kind(index: u8) -> String {
    format!("{KIND}/{index}")
}

/// A processor as a part that can be saved. It must stand.
pub struct VcpuPart {
    vcpu: Vcpu,
    /// What this host's KVM has of MSRs.
    known_msrs: Arc<[u32]>,
    /// Ticks by which a restored time stamp counter is ahead of the saved one.
    ahead: u64,
}

impl VcpuPart {
    /// The processor, on a host with these MSRs.
    pub fn new(vcpu: Vcpu, known_msrs: Arc<[u32]>) -> Self {
        Self { vcpu, known_msrs, ahead: 0 }
    }

    /// Restores the time stamp counter `ticks` ahead: as many as have passed since it was saved. It is the same for all
    /// processors of a machine: KVM gives counters that are written within a second of each other one common offset.
    pub fn ahead(self, ticks: u64) -> Self {
        Self { ahead: ticks, ..self }
    }

    /// Kind of the processor's section: `vcpu/` and its number.
    pub fn kind(&self) -> String {
        kind(self.vcpu.index())
    }
}

fn failed(call: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> StateError {
    move |err| StateError::Invalid { kind: KIND, what: format!("{call}: {err}") }
}

/// An MSR that cannot be given its saved value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MsrError {
    /// KVM does not know it.
    #[error("MSR {0:#x}: found none, needed")]
    Unknown(u32),
    /// KVM refuses the value.
    #[error("MSR {0:#x}: the value {1:#x} is needed and cannot be set")]
    Value(u32, u64),
}

/// Why a processor cannot be restored.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// It has what this host does not.
    #[error("the processor does not fit this host")]
    Msr(#[from] MsrError),
    /// Its section is damaged, or KVM refuses it.
    #[error("the processor's state cannot be set")]
    State(#[from] StateError),
}

/// The section's kind is `vcpu/` and the processor's number.
impl Persist for VcpuPart {
    fn save(&self) -> Result<Section, StateError> {
        let fd = self.vcpu.lock();
        let state = VcpuV1 {
            mp_state: fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?,
            regs: fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xsave: fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debug: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            apic: fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            msrs: read_msrs(&fd, &self.known_msrs)?,
            events: fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
        };
        state.section(self.vcpu.index())
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        self.apply(section).map_err(|err| match err {
            VcpuError::State(err) => err,
            VcpuError::Msr(err) => StateError::Invalid { kind: KIND, what: err.to_string() },
        })
    }
}

impl VcpuPart {
    /// As [`Persist::restore`]. KVM checks what registers may hold; which MSRs may be set is checked here. The processor's
    /// CPUID must be set already, as it is after the machine was built.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn apply(&self, section: &Section) -> Result<(), VcpuError> {
        let state = VcpuV1::load(section, self.vcpu.index())?;
        let msrs = self.check_msrs(state.msrs)?;
        let fd = self.vcpu.lock();
        fd.set_mp_state(state.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        fd.set_regs(&state.regs).map_err(failed("KVM_SET_REGS"))?;
        fd.set_sregs(&state.sregs).map_err(failed("KVM_SET_SREGS"))?;
        // SAFETY: without permission for dynamic features, which this process never asks for, KVM reads exactly the
        // 4096 bytes of the structure.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&state.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&state.debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&state.apic).map_err(failed("KVM_SET_LAPIC"))?;
        let (deadline, others): (Vec<_>, Vec<_>) = msrs.into_iter().partition(|(index, _)| *index == MSR_TSC_DEADLINE);
        write_msrs(&fd, &others)?;
        write_msrs(&fd, &deadline)?;
        fd.set_vcpu_events(&state.events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        Ok(())
    }

    /// Only what this host's KVM lists as a guest's may be set. One that it does not know is left out if it holds nothing.
    fn check_msrs(&self, saved: Vec<(u32, u64)>) -> Result<Vec<(u32, u64)>, VcpuError> {
        if saved.len() > MAX_MSRS {
            return Err(StateError::Invalid { kind: KIND, what: format!("{} MSRs", saved.len()) }.into());
        }
        let mut msrs = Vec::with_capacity(saved.len());
        for (index, value) in saved {
            match (self.known_msrs.contains(&index), value) {
                (true, _) if index == MSR_TSC => msrs.push((index, value.wrapping_add(self.ahead))),
                (true, _) => msrs.push((index, value)),
                (false, 0) => {}
                (false, _) => return Err(MsrError::Unknown(index).into()),
            }
        }
        Ok(msrs)
    }
}

/// Reads the MSRs that this processor has out of those that KVM knows.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = rest.get(..MSR_BATCH).unwrap_or(rest);
        let entries: Vec<_> = batch.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = wrap(&entries)?;
        let count = fd.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice().iter().take(count).map(|entry| (entry.index, entry.data)));
        // KVM stops at the first one that this processor's CPUID hides: that one is left out.
        let taken = if count < batch.len() { count + 1 } else { count };
        rest = rest.get(taken..).unwrap_or_default();
    }
    Ok(values)
}

fn write_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), VcpuError> {
    let mut rest = values;
    while !rest.is_empty() {
        let batch = rest.get(..MSR_BATCH).unwrap_or(rest);
        let entries: Vec<_> = batch
            .iter()
            .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
            .collect();
        let count = fd.set_msrs(&wrap(&entries)?).map_err(failed("KVM_SET_MSRS"))?;
        let taken = match batch.get(count) {
            None => count,
            // Some can be read but not written, unless they hold what they have after power-on.
            Some((_, 0)) => count + 1,
            Some((index, value)) => return Err(MsrError::Value(*index, *value).into()),
        };
        rest = rest.get(taken..).unwrap_or_default();
    }
    Ok(())
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    Msrs::from_entries(entries).map_err(|_| StateError::Invalid { kind: KIND, what: "too many MSRs".into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::{self, Topology};
    use crate::kvm::Vm;
    use crate::memory::Ram;
    use crate::vcpu::regs;
    use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    use kvm_ioctls::Kvm;
    use std::fs::File;

    fn part(index: u8) -> VcpuPart {
        let ram = Ram::map(32 << 20).unwrap();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let supported = Kvm::new().unwrap().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let vm = Vm::new(kvm.into()).unwrap();
        vm.add_memory(&ram).unwrap();
        let vcpu = Vcpu::new(&vm, index).unwrap();
        let topology = Topology { vcpus: 2, tsc_deadline: vm.has_tsc_deadline_timer() };
        vcpu.lock().set_cpuid2(&cpuid::for_vcpu(supported.as_slice(), topology, index).unwrap()).unwrap();
        regs::set_common(&vcpu.lock()).unwrap();
        VcpuPart::new(vcpu, vm.msr_indices().unwrap().into())
    }

    /// The state, without the clock that goes on meanwhile.
    fn still(section: &Section) -> serde_json::Value {
        let mut state: serde_json::Value = serde_json::from_slice(&section.payload).unwrap();
        let msrs = state["msrs"].as_array_mut().unwrap();
        msrs.retain(|entry| entry[0] != MSR_TSC);
        assert!(msrs.len() > 10);
        state
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn restored_processor_saves_what_it_was_given() {
        let original = part(1);
        let mut registers = original.vcpu.lock().get_regs().unwrap();
        (registers.rax, registers.rip, registers.r15) = (0x1234, 0x10_0000, 0xdead);
        original.vcpu.lock().set_regs(&registers).unwrap();
        let mut apic = original.vcpu.lock().get_lapic().unwrap();
        apic.regs[0x80] = 0x20;
        original.vcpu.lock().set_lapic(&apic).unwrap();
        let saved = original.save().unwrap();
        assert_eq!(saved.kind, "vcpu/1");
        let other = part(1);
        assert_ne!(still(&other.save().unwrap()), still(&saved));
        other.restore(&saved).unwrap();
        assert_eq!(still(&other.save().unwrap()), still(&saved));
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn restore_of_another_processor_or_a_foreign_msr_is_refused() {
        let part = part(0);
        let mut saved = part.save().unwrap();
        let mut state: VcpuV1 = serde_json::from_slice(&saved.payload).unwrap();
        state.msrs.push((0xdead_beef, 1));
        saved.payload = serde_json::to_vec(&state).unwrap();
        assert!(part.restore(&saved).unwrap_err().to_string().contains("0xdeadbeef"));
        saved.kind = "vcpu/1".into();
        assert!(matches!(part.restore(&saved), Err(StateError::WrongKind { .. })));
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn section_with_any_byte_flipped_is_refused_or_hurts_no_later_state() {
        let part = part(0);
        let saved = part.save().unwrap();
        let (mut refused, mut messages) = (0, std::collections::BTreeSet::new());
        for at in 0..saved.payload.len() {
            let mut bad = saved.clone();
            bad.payload[at] ^= 1 << (at % 8);
            if let Err(err) = part.apply(&bad) {
                refused += 1;
                messages.insert(crate::report::chain(&err));
            }
        }
        assert!(refused > 100 && refused < saved.payload.len(), "{refused} of {}", saved.payload.len());
        assert!(messages.iter().all(|message| message.len() > 20), "{messages:?}");
        // Whatever registers, local APIC and MSRs have held meanwhile.
        part.restore(&saved).unwrap();
        assert_eq!(still(&part.save().unwrap()), still(&saved));
    }
}
