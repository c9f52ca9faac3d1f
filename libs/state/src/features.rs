//! CPUID compared: which leaves hold feature bits, what the bits are called, and which numbers must be reached.
//!
//! Names are those of `/proc/cpuinfo` (arch/x86/include/asm/cpufeatures.h); a bit without a name is called by its place.
//!
//! What is compared must be what the guest would see. KVM looks an entry up by its function, and by its index only where the
//! entry says that the index counts (`cpuid_entry2_find` of arch/x86/kvm/cpuid.c); the first that fits is taken. So
//! [`check_form`] refuses lists in which that is another entry than the obvious one, and [`find`] looks up as KVM does.

use std::collections::{BTreeMap, BTreeSet};

use crate::{fingerprint::CpuidEntry, Incompatible};

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`, the only flag that KVM still gives: the entry is for its index alone.
const SIGNIFICANT_INDEX: u32 = 1;
/// Functions that are compared by index. Every other one that is compared has one entry, whatever the index.
const INDEXED: [u32; 2] = [0x7, 0xd];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn name(self) -> &'static str {
        match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        }
    }
}

/// A register whose bits are features. A bit that is set must be set on the host, unless `ignore` has it: it shows a state
/// of the guest's own (OSXSAVE, OSPKE), or that there is a hypervisor.
struct Leaf {
    function: u32,
    index: u32,
    register: Register,
    ignore: u32,
    names: &'static str,
}

const fn leaf(function: u32, index: u32, register: Register, ignore: u32, names: &'static str) -> Leaf {
    Leaf { function, index, register, ignore, names }
}

/// Names from bit 0 up; `-` is a bit without one.
const LEAVES: &[Leaf] = &[
    leaf(
        1,
        0,
        Register::Edx,
        0,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse \
         sse2 ss ht tm ia64 pbe",
    ),
    leaf(
        1,
        0,
        Register::Ecx,
        1 << 27 | 1 << 31,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 \
         x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    leaf(
        7,
        0,
        Register::Ebx,
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f \
         avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
         avx512bw avx512vl",
    ),
    leaf(
        7,
        0,
        Register::Ecx,
        1 << 4,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock_detect cldemote - movdiri movdir64b enqcmd \
         sgx_lc pks",
    ),
    leaf(
        7,
        0,
        Register::Edx,
        0,
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - \
         tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile \
         amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    leaf(
        7,
        1,
        Register::Eax,
        0,
        "- - - lass avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - - - - - amx_fp16 - avx_ifma - - lam",
    ),
    leaf(7, 1, Register::Ebx, 0, "ppin"),
    leaf(7, 1, Register::Ecx, 0, "- - - - - msr_imm"),
    leaf(7, 1, Register::Edx, 0, "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - - - - - prefetchiti"),
    leaf(7, 2, Register::Edx, 0, "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    leaf(
        0xd,
        0,
        Register::Eax,
        0,
        "x87 sse-state avx-state bndregs bndcsr avx512-opmask avx512-zmm-hi256 avx512-hi16-zmm pt-state pkru-state",
    ),
    leaf(0xd, 0, Register::Edx, 0, ""),
    leaf(0xd, 1, Register::Eax, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    // What XSAVES keeps beyond that: IA32_XSS.
    leaf(
        0xd,
        1,
        Register::Ecx,
        0,
        "- - - - - - - - pt-state - pasid-state cet-user-state cet-kernel-state hdc-state uintr-state lbr-state hwp-state",
    ),
    leaf(0xd, 1, Register::Edx, 0, ""),
    leaf(
        0x4000_0001,
        0,
        Register::Eax,
        0,
        "kvm-clocksource kvm-nop-io-delay kvm-mmu-op kvm-clocksource2 kvm-async-pf kvm-steal-time kvm-pv-eoi \
         kvm-pv-unhalt - kvm-pv-tlb-flush kvm-async-pf-vmexit kvm-pv-send-ipi kvm-poll-control kvm-pv-sched-yield \
         kvm-async-pf-int kvm-msi-ext-dest-id kvm-hc-map-gpa-range kvm-migration-control - - - - - - \
         kvm-clocksource-stable",
    ),
    leaf(
        0x8000_0001,
        0,
        Register::Edx,
        0,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr \
         fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    leaf(
        0x8000_0001,
        0,
        Register::Ecx,
        0,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 \
         tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    leaf(0x8000_0007, 0, Register::Edx, 0, "- - - - - - - - constant_tsc"),
    leaf(
        0x8000_0008,
        0,
        Register::Ebx,
        0,
        "clzero irperf xsaveerptr invlpgb rdpru - mba - mcommit wbnoinvd - - ibpb wbinvd_int ibrs stibp ibrs_always_on \
         stibp_always_on ibrs_preferred ibrs_same_mode no_efer_lmsle tlbi_va_nested - ppin amd_ssbd virt_ssbd ssb_no \
         cppc amd_psfd btc_no ibpb_ret branch_sampling",
    ),
    leaf(
        0x8000_000a,
        0,
        Register::Edx,
        0,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - pfthreshold avic - \
         v_vmsave_vmload vgif - x2avic - v_spec_ctrl - - - - vnmi - - svme_addr_chk",
    ),
    leaf(
        0x8000_0021,
        0,
        Register::Eax,
        0,
        "no_nested_data_bp fs_gs_not_serializing lfence_rdtsc - - - null_sel_clr_base upper_addr_ignore autoibrs \
         no_smm_ctl_msr - - - prefetch_ctl_msr - - - cpuid_user_dis - - fsrs2 - - - - - - sbpb ibpb_brtype srso_no",
    ),
];

/// Numbers that the guest relies on: leaf, sub-leaf, register, shift, mask, what it is.
const NUMBERS: &[(u32, u32, Register, u32, u32, &str)] = &[
    (0xd, 0, Register::Ecx, 0, u32::MAX, "bytes of processor state that XSAVE keeps"),
    (0x8000_0008, 0, Register::Eax, 0, 0xff, "bits of a physical address"),
    (0x8000_0008, 0, Register::Eax, 8, 0xff, "bits of a linear address"),
];

/// Components of processor state that have a place of their own in what XSAVE writes: their leaf 0xd sub-leaves.
const COMPONENTS: std::ops::Range<u32> = 2..63;

/// Whether a processor with CPUID `host` can do all that `guest` was shown.
pub(crate) fn check(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Result<(), Incompatible> {
    let needed = vendor(guest);
    if needed.is_some() && needed != vendor(host) {
        let say = |vendor: Option<String>| vendor.unwrap_or_else(|| "none".into());
        return Err(Incompatible::Vendor { found: say(vendor(host)), needed: say(needed) });
    }
    check_features(guest, host)?;
    for (function, index, register, shift, mask, what) in NUMBERS {
        let number = |cpuid| u64::from(value(cpuid, *function, *index, *register).wrapping_shr(*shift) & mask);
        let (needed, found) = (number(guest), number(host));
        if needed > found {
            return Err(Incompatible::Number { what, found, needed });
        }
    }
    check_components(guest, host)
}

/// The guest looks for each component where CPUID has told it, and the host's processor writes it where its own place is.
fn check_components(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Result<(), Incompatible> {
    for component in COMPONENTS {
        let place = |cpuid| [Register::Eax, Register::Ebx].map(|register| value(cpuid, 0xd, component, register));
        let (needed, found) = (place(guest), place(host));
        if needed != [0; 2] && needed != found {
            let say = |[size, offset]: [u32; 2]| format!("{size} bytes at {offset}");
            return Err(Incompatible::Component { component, found: say(found), needed: say(needed) });
        }
    }
    Ok(())
}

fn check_features(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Result<(), Incompatible> {
    let (mut missing, mut instead) = (Vec::new(), Vec::new());
    for leaf in LEAVES {
        let found = value(host, leaf.function, leaf.index, leaf.register);
        let lacking = value(guest, leaf.function, leaf.index, leaf.register) & !found & !leaf.ignore;
        if lacking == 0 {
            continue;
        }
        let (function, index, register) = (leaf.function, leaf.index, leaf.register.name());
        let place = format!("CPUID {function:#x}.{index} {register}");
        let mut names = leaf.names.split_whitespace();
        for bit in 0..u32::BITS {
            let name = names.next().filter(|name| *name != "-").unwrap_or("a feature");
            if lacking >> bit & 1 == 1 {
                missing.push(format!("{name} ({place} bit {bit})"));
            }
        }
        instead.push(format!("{place} {found:#010x}"));
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Incompatible::Features { found: instead.join(", "), needed: missing.join(", ") })
}

/// Whether each entry is the one that KVM takes for its leaf.
pub(crate) fn check_form(cpuid: &[CpuidEntry]) -> Result<(), String> {
    let (mut seen, mut kinds) = (BTreeSet::new(), BTreeMap::new());
    for entry in cpuid {
        let CpuidEntry { function, index, flags, .. } = *entry;
        let refused = |why: &str| Err(format!("its entry for CPUID {function:#x}.{index} {why}"));
        let by_index = flags == SIGNIFICANT_INDEX;
        if !by_index && flags != 0 {
            return refused(&format!("has the flags {flags:#x}, which are not known"));
        }
        if !by_index && index != 0 {
            return refused("has an index that does not count");
        }
        if !seen.insert((function, index)) {
            return refused("is there twice");
        }
        if kinds.insert(function, by_index).is_some_and(|before| !before || !by_index) {
            return refused("stands beside one that is for every index");
        }
        let compared = function == 0 || LEAVES.iter().any(|leaf| leaf.function == function);
        if compared && by_index != INDEXED.contains(&function) {
            return refused("does not say of its index what a processor's says");
        }
    }
    Ok(())
}

/// The entry that KVM takes.
fn find(cpuid: &[CpuidEntry], function: u32, index: u32) -> Option<&CpuidEntry> {
    let fits = |entry: &&CpuidEntry| {
        entry.function == function && (entry.flags & SIGNIFICANT_INDEX == 0 || entry.index == index)
    };
    cpuid.iter().find(fits)
}

/// The register of a leaf; 0 if the processor does not have the leaf, as the hardware says it.
fn value(cpuid: &[CpuidEntry], function: u32, index: u32, register: Register) -> u32 {
    find(cpuid, function, index).map_or(0, |entry| entry.register(register))
}

/// The twelve letters of leaf 0.
fn vendor(cpuid: &[CpuidEntry]) -> Option<String> {
    let leaf = find(cpuid, 0, 0)?;
    let letters = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    Some(letters.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '?' }).collect())
}
