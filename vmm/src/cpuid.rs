//! What a guest's processor says about itself: what KVM supports, with this machine's topology in it.

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};
use vmm_sys_util::errno;

use crate::kvm::{failed, KvmError};

/// Extended topology, and its second version.
const TOPOLOGY_LEAFS: [u32; 2] = [0xb, 0x1f];

/// Leaf 1, ECX: TSC-deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is there.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the APIC timer runs in every power state.
const ARAT: u32 = 1 << 2;

/// What does not depend on the processor's number.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Number of processors, all cores of one package.
    pub vcpus: u8,
    /// The local APICs have a TSC-deadline timer.
    pub tsc_deadline: bool,
}

impl Topology {
    /// Bits of an APIC id that number the cores of the package.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// Fits what KVM supports, or what the processors of a saved machine said, to processor number `index` of the machine.
/// What was fitted once is not changed by it.
///
/// # Errors
/// More leafs than KVM takes.
pub fn for_vcpu(given: &[kvm_cpuid_entry2], topology: Topology, index: u8) -> Result<CpuId, KvmError> {
    let highest = given.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    // KVM gives at most an empty first level of the topology leafs: they are written anew.
    let mut entries: Vec<_> = given.iter().filter(|entry| !TOPOLOGY_LEAFS.contains(&entry.function)).copied().collect();
    for entry in &mut entries {
        // Kernels before 5.7 say of leaf 2 that it counts its calls, and answer one; of no other flag is there use.
        entry.flags &= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        adapt(entry, topology, index);
    }
    for function in TOPOLOGY_LEAFS.into_iter().filter(|function| *function <= highest) {
        entries.extend((0..=1).map(|level| topology_level(function, level, topology, index)));
    }
    CpuId::from_entries(&entries).map_err(|_| failed("KVM_SET_CPUID2")(errno::Error::new(libc::E2BIG)))
}

fn adapt(entry: &mut kvm_cpuid_entry2, topology: Topology, index: u8) {
    let cores = u32::from(topology.vcpus);
    let apic_id = u32::from(index);
    match entry.function {
        0x1 => {
            let per_package = 1u32 << topology.core_bits();
            entry.ebx = (entry.ebx & 0xffff) | (apic_id << 24) | (per_package << 16);
            entry.ecx |= HYPERVISOR;
            set(&mut entry.ecx, TSC_DEADLINE, topology.tsc_deadline);
            set(&mut entry.edx, HTT, cores > 1);
        }
        // Deterministic cache parameters (Intel; the same layout on AMD): no sharing below the last level, which all
        // cores share.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { (1 << topology.core_bits()) - 1 } else { 0 };
            entry.eax = (entry.eax & !0xffff_c000) | (sharing << 14);
            if entry.function == 0x4 {
                entry.eax |= ((1 << topology.core_bits()) - 1) << 26;
            }
        }
        0x6 => entry.eax |= ARAT,
        // No performance counters: what the host has changes under a machine that is restored elsewhere.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (topology.core_bits() << 12) | (cores - 1),
        // AMD: extended APIC id, one thread a core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id & 0xff, 0),
        _ => {}
    }
}

/// One level of leafs 0xb and 0x1f: level 0 numbers threads (one a core), level 1 cores (Intel SDM vol. 2, CPUID).
fn topology_level(function: u32, level: u32, topology: Topology, index: u8) -> kvm_cpuid_entry2 {
    let (kind, shift, count) = match level {
        0 => (1, 0, 1),
        _ => (2, topology.core_bits(), u32::from(topology.vcpus)),
    };
    kvm_cpuid_entry2 {
        function,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: (kind << 8) | level,
        edx: u32::from(index),
        ..Default::default()
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapt_all(entries: &[kvm_cpuid_entry2], vcpus: u8, number: u8) -> Vec<kvm_cpuid_entry2> {
        for_vcpu(entries, Topology { vcpus, tsc_deadline: true }, number).unwrap().as_slice().to_vec()
    }

    fn adapted(function: u32, index: u32, eax: u32, vcpus: u8, number: u8) -> kvm_cpuid_entry2 {
        adapt_all(&[kvm_cpuid_entry2 { function, index, eax, ..Default::default() }], vcpus, number)[0]
    }

    #[test]
    fn leaf_1_holds_apic_id_and_timer() {
        let leaf = adapted(1, 0, 0, 6, 5);
        assert_eq!(leaf.ebx >> 24, 5);
        assert_eq!((leaf.ebx >> 16) & 0xff, 8);
        assert_eq!(leaf.ecx & (TSC_DEADLINE | HYPERVISOR), TSC_DEADLINE | HYPERVISOR);
        assert_eq!(leaf.edx & HTT, HTT);
        assert_eq!(adapted(1, 0, 0, 1, 0).edx & HTT, 0);
    }

    #[test]
    fn topology_leafs_have_one_thread_a_core_and_all_cores_in_the_package() {
        let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let entries = adapt_all(&[leaf(0, 0x1f), leaf(0xb, 0)], 32, 31);
        for function in TOPOLOGY_LEAFS {
            let levels: Vec<_> = entries.iter().filter(|entry| entry.function == function).collect();
            let [threads, cores] = levels.as_slice() else { panic!("{levels:?}") };
            assert_eq!((threads.index, threads.eax, threads.ebx, threads.ecx), (0, 0, 1, 0x100));
            assert_eq!((cores.index, cores.eax, cores.ebx, cores.ecx), (1, 5, 32, 0x201));
            assert_eq!([threads.edx, cores.edx], [31; 2]);
        }
    }

    #[test]
    fn topology_leafs_beyond_the_highest_are_left_out() {
        let entries = adapt_all(&[kvm_cpuid_entry2 { function: 0, eax: 0xd, ..Default::default() }], 4, 0);
        let functions: Vec<_> = entries.iter().map(|entry| entry.function).collect();
        assert_eq!(functions, [0, 0xb, 0xb]);
    }

    #[test]
    fn flags_are_left_of_which_a_snapshot_may_say_something() {
        let leaf = |function, flags| kvm_cpuid_entry2 { function, flags, ..Default::default() };
        let entries = adapt_all(&[leaf(2, 0b110), leaf(4, KVM_CPUID_FLAG_SIGNIFCANT_INDEX)], 1, 0);
        assert_eq!(entries.iter().map(|entry| entry.flags).collect::<Vec<_>>(), [0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX]);
    }

    #[test]
    fn caches_are_shared_at_the_last_level_only() {
        let first = adapted(4, 0, 1 | (1 << 5) | (9 << 14), 4, 0);
        let last = adapted(4, 3, 3 | (3 << 5), 4, 0);
        assert_eq!((first.eax >> 14) & 0xfff, 0);
        assert_eq!((last.eax >> 14) & 0xfff, 3);
        assert_eq!(last.eax >> 26, 3);
        assert_eq!(adapted(4, 4, 0, 4, 0).eax, 0);
    }

    #[test]
    fn amd_leafs_hold_the_core_count() {
        assert_eq!(adapted(0x8000_0008, 0, 0, 4, 3).ecx, (2 << 12) | 3);
        let node = adapted(0x8000_001e, 0, 0, 4, 3);
        assert_eq!((node.eax, node.ebx & 0xff), (3, 3));
    }
}
