//! On what a machine ran, and whether another host can go on with it.
//!
//! A guest looks at its processor once, at boot, and relies on what it saw for ever after: so each feature that it was
//! shown must be there. What the host has beyond that does no harm, since the guest's own CPUID is restored.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::features::{self, Register};

/// The guest's and the host's clock rates may differ by this much without scaling, in parts per million: what NTP
/// corrects, and what KVM itself calls equal (`tsc_tolerance_ppm` of arch/x86/kvm/x86.c).
const TSC_TOLERANCE_PPM: u64 = 250;
/// The capability that lets a guest run at another clock rate than its host's.
pub(crate) const TSC_SCALING: &str = "tsc-scaling";

/// The longest list of a fingerprint; processors have about 60 leaves.
const MAX_LIST: usize = 1024;
/// The longest name in a fingerprint, in bytes.
const MAX_NAME: usize = 64;

/// One leaf of CPUID, as `kvm_cpuid_entry2` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidEntry {
    /// The leaf (EAX before the instruction).
    pub function: u32,
    /// The sub-leaf (ECX before the instruction).
    pub index: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl CpuidEntry {
    pub(crate) fn register(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }
}

/// A disk as the guest knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPrint {
    /// Its size in bytes.
    pub size: u64,
    /// The guest was told that it cannot write.
    pub read_only: bool,
}

/// What a machine saw of its host when the snapshot was taken; the same taken of a host says what it has to offer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Version of the VMM.
    pub vmm: String,
    /// CPUID as the guest sees it (of a host: as a guest would see it), vCPU 0.
    #[serde(default)]
    pub cpuid: Vec<CpuidEntry>,
    /// KVM capabilities that the state relies on (of a host: has), in the VMM's words; `tsc-scaling` has a meaning here.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// Rate of the time-stamp counter in kHz; 0: not known.
    #[serde(default)]
    pub tsc_khz: u32,
    /// Kinds of the devices, in their order on the bus (of a host: of the machine that is being built).
    #[serde(default)]
    pub devices: Vec<String>,
    /// The disks, in their order.
    #[serde(default)]
    pub disks: Vec<DiskPrint>,
    /// When it was taken, in nanoseconds since 1970 UTC.
    #[serde(default)]
    pub taken: u64,
}

/// Why a host cannot go on with a machine.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Incompatible {
    /// Another architecture.
    #[error("the architecture: found {found}, needed {needed}")]
    Arch {
        /// Of this host.
        found: &'static str,
        /// Of the snapshot.
        needed: &'static str,
    },
    /// Another maker of processors.
    #[error("the processor's vendor: found {found}, needed {needed}")]
    Vendor {
        /// Of this host.
        found: String,
        /// Of the snapshot.
        needed: String,
    },
    /// Feature bits.
    #[error("CPU features: found {found}, needed {needed}")]
    Features {
        /// What this host has instead, by register.
        found: String,
        /// The features that are missing, each with its place in CPUID.
        needed: String,
    },
    /// A number in CPUID that this host does not reach.
    #[error("{what}: found {found}, needed {needed}")]
    Number {
        /// What the number counts.
        what: &'static str,
        /// Of this host.
        found: u64,
        /// Of the snapshot.
        needed: u64,
    },
    /// A part of the processor's state that this host's processors keep elsewhere.
    #[error("component {component} of the processor state that XSAVE keeps: found {found}, needed {needed}")]
    Component {
        /// Its number: a sub-leaf of CPUID leaf 0xd.
        component: u32,
        /// Size and offset on this host.
        found: String,
        /// Size and offset that the guest was told.
        needed: String,
    },
    /// A KVM capability.
    #[error("the KVM capability {needed}: found {found}")]
    Capability {
        /// What this host has.
        found: String,
        /// What is missing.
        needed: String,
    },
    /// The clock rate.
    #[error(
        "the time-stamp counter's rate: found {found} kHz without the KVM capability tsc-scaling, needed {needed} kHz"
    )]
    Tsc {
        /// Of this host.
        found: u32,
        /// Of the snapshot.
        needed: u32,
    },
    /// The devices.
    #[error("the machine's devices: found {found}, needed {needed}")]
    Devices {
        /// Those of the machine that is being built.
        found: String,
        /// Those of the snapshot.
        needed: String,
    },
    /// The disks.
    #[error("disk {index}: found {found}, needed {needed}")]
    Disk {
        /// Which.
        index: usize,
        /// What the machine that is being built has.
        found: String,
        /// What the snapshot's machine has.
        needed: String,
    },
}

impl Fingerprint {
    /// Whether `host` can go on with the machine that this was taken of: processor, clock and KVM. Devices and disks
    /// are compared by [`Fingerprint::check_machine`].
    ///
    /// # Errors
    /// The first [`Incompatible`] thing.
    pub fn check(&self, host: &Fingerprint) -> Result<(), Incompatible> {
        features::check(&self.cpuid, &host.cpuid)?;
        for needed in &self.capabilities {
            // Scaling is needed only where the rates differ.
            if needed != TSC_SCALING && !host.capabilities.contains(needed) {
                let found = listed(&host.capabilities);
                return Err(Incompatible::Capability { found, needed: needed.clone() });
            }
        }
        self.check_tsc(host)
    }

    /// The bounds of the format: what is printed is printable, none of the lists is long, and CPUID means to KVM what it
    /// means to [`Fingerprint::check`].
    pub(crate) fn validate(&self) -> Result<(), String> {
        let lists = [("CPUID", self.cpuid.len()), ("capabilities", self.capabilities.len())];
        let machine = [("devices", self.devices.len()), ("disks", self.disks.len())];
        if let Some((what, count)) = lists.into_iter().chain(machine).find(|(_, count)| *count > MAX_LIST) {
            return Err(format!("its list of {what} has {count} entries, at most {MAX_LIST}"));
        }
        features::check_form(&self.cpuid)?;
        let is_name = |text: &String| text.len() <= MAX_NAME && text.bytes().all(|b| b.is_ascii_graphic());
        let mut names = self.capabilities.iter().chain(&self.devices).chain([&self.vmm]);
        match names.all(is_name) {
            true => Ok(()),
            false => Err(format!("its fingerprint holds a name that is not up to {MAX_NAME} printable characters")),
        }
    }

    fn check_tsc(&self, host: &Fingerprint) -> Result<(), Incompatible> {
        let (needed, found) = (self.tsc_khz, host.tsc_khz);
        if needed == 0 || found == 0 || host.capabilities.iter().any(|has| has == TSC_SCALING) {
            return Ok(());
        }
        let off = u64::from(needed.abs_diff(found)).saturating_mul(1_000_000);
        if off > u64::from(found).saturating_mul(TSC_TOLERANCE_PPM) {
            return Err(Incompatible::Tsc { found, needed });
        }
        Ok(())
    }

    /// Whether a machine with these devices and disks is the one that this was taken of.
    ///
    /// # Errors
    /// [`Incompatible::Devices`], [`Incompatible::Disk`].
    pub fn check_machine(&self, devices: &[String], disks: &[DiskPrint]) -> Result<(), Incompatible> {
        if self.devices != devices {
            return Err(Incompatible::Devices { found: listed(devices), needed: listed(&self.devices) });
        }
        let say = |disk: Option<&DiskPrint>| match disk {
            None => "none".to_owned(),
            Some(disk) => format!("{} bytes{}", disk.size, if disk.read_only { ", read-only" } else { "" }),
        };
        for index in 0..self.disks.len().max(disks.len()) {
            let (needed, found) = (self.disks.get(index), disks.get(index));
            if needed != found {
                return Err(Incompatible::Disk { index, found: say(found), needed: say(needed) });
            }
        }
        Ok(())
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, flags: u32::from([7, 0xd].contains(&function)), eax, ebx, ecx, edx }
    }

    /// A small processor: vendor, SSE2 and FPU, AVX2, address sizes.
    fn print() -> Fingerprint {
        let letters = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let cpuid = vec![
            leaf(0, 0, [7, letters(b"Auth"), letters(b"cAMD"), letters(b"enti")]),
            leaf(1, 0, [0, 0, 1 << 27 | 1 << 31, 1 << 26 | 1]),
            leaf(7, 0, [0, 1 << 5, 0, 0]),
            leaf(0x8000_0008, 0, [48 << 8 | 40, 0, 0, 0]),
        ];
        let capabilities = vec!["irqchip-split".to_owned(), "xcrs".into()];
        Fingerprint { cpuid, capabilities, tsc_khz: 2_000_000, ..Fingerprint::default() }
    }

    fn refusal(host: &Fingerprint) -> String {
        print().check(host).unwrap_err().to_string()
    }

    #[test]
    fn the_same_host_and_a_better_one_can_go_on() {
        print().check(&print()).unwrap();
        let mut better = print();
        better.cpuid[2].ebx = u32::MAX;
        better.cpuid[3].eax = 57 << 8 | 52;
        better.capabilities.push("more".into());
        better.tsc_khz += 400;
        print().check(&better).unwrap();
    }

    #[test]
    fn missing_features_are_named_with_their_place() {
        let mut host = print();
        host.cpuid[1].edx = 1;
        host.cpuid.remove(2);
        let want = "CPU features: found CPUID 0x1.0 EDX 0x00000001, CPUID 0x7.0 EBX 0x00000000, needed \
                    sse2 (CPUID 0x1.0 EDX bit 26), avx2 (CPUID 0x7.0 EBX bit 5)";
        assert_eq!(refusal(&host), want);
    }

    #[test]
    fn state_of_the_guest_in_a_feature_register_is_no_feature() {
        let mut host = print();
        host.cpuid[1].ecx = 0;
        print().check(&host).unwrap();
    }

    #[test]
    fn another_vendor_or_smaller_addresses_are_refused() {
        let mut host = print();
        host.cpuid[0].ebx = u32::from_le_bytes(*b"Genu");
        assert!(refusal(&host).starts_with("the processor's vendor: found GenuenticAMD, needed AuthenticAMD"));
        let mut host = print();
        host.cpuid[3].eax = 48 << 8 | 39;
        assert_eq!(refusal(&host), "bits of a physical address: found 39, needed 40");
    }

    #[test]
    fn an_entry_that_kvm_would_take_for_another_is_refused() {
        let entry = |function, index, flags| CpuidEntry { flags, ..leaf(function, index, [u32::MAX; 4]) };
        let avx2 = |index, flags| CpuidEntry { ebx: 1 << 5, ..entry(7, index, flags) };
        // Where the forged entry stands, and what is said of it. The first one hid features from a comparison by index.
        let cases = [
            (0, entry(1, 1, 0), "CPUID 0x1.1 has an index that does not count"),
            (9, entry(1, 1, 0), "CPUID 0x1.1 has an index that does not count"),
            (0, entry(1, 1, 1), "CPUID 0x1.1 does not say of its index what a processor's says"),
            (0, entry(0, 1, 1), "CPUID 0x0.1 does not say of its index what a processor's says"),
            (0, entry(0, 0, 0), "CPUID 0x0.0 is there twice"),
            (9, entry(1, 0, 0), "CPUID 0x1.0 is there twice"),
            (9, avx2(0, 1), "CPUID 0x7.0 is there twice"),
            (0, avx2(0, 0), "CPUID 0x7.0 does not say of its index what a processor's says"),
            (9, avx2(1, 0), "CPUID 0x7.1 has an index that does not count"),
            (9, entry(1, 3, 1), "CPUID 0x1.3 stands beside one that is for every index"),
            (9, entry(2, 0, 6), "CPUID 0x2.0 has the flags 0x6, which are not known"),
            (9, entry(2, 0, 1 << 31 | 1), "CPUID 0x2.0 has the flags 0x80000001, which are not known"),
        ];
        print().validate().unwrap();
        for (at, forged, want) in cases {
            let mut bad = print();
            bad.cpuid.insert(at.min(bad.cpuid.len()), forged);
            let err = bad.validate().unwrap_err();
            assert_eq!(err, format!("its entry for {want}"));
        }
        let mut apart = print();
        apart.cpuid.extend([entry(4, 0, 1), entry(4, 1, 0)]);
        assert_eq!(apart.validate().unwrap_err(), "its entry for CPUID 0x4.1 has an index that does not count");
        apart.cpuid[4..].copy_from_slice(&[entry(4, 0, 0), entry(4, 1, 1)]);
        assert!(apart.validate().unwrap_err().ends_with("CPUID 0x4.1 stands beside one that is for every index"));
    }

    #[test]
    fn compared_is_the_entry_that_kvm_takes() {
        // Both would be refused by their form; here nobody has looked at that.
        let first = |entry: CpuidEntry| {
            let mut bad = print();
            bad.cpuid.insert(0, entry);
            bad.check(&print()).unwrap_err().to_string()
        };
        assert!(first(leaf(1, 1, [0, 0, 1 << 25, 0])).ends_with("needed aes (CPUID 0x1.0 ECX bit 25)"));
        assert!(first(leaf(0, 5, [0; 4])).starts_with("the processor's vendor: found AuthenticAMD, needed"));
    }

    #[test]
    fn features_of_saved_state_and_of_nested_guests_are_compared() {
        for (missing, want) in [
            (leaf(0xd, 1, [0, 0, 1 << 11, 0]), "cet-user-state (CPUID 0xd.1 ECX bit 11)"),
            (leaf(0xd, 1, [0, 0, 0, 1]), "a feature (CPUID 0xd.1 EDX bit 0)"),
            (leaf(0xd, 0, [0, 0, 0, 1 << 30]), "a feature (CPUID 0xd.0 EDX bit 30)"),
            (leaf(0x8000_000a, 0, [1, 16, 0, 1 | 1 << 25]), "npt (CPUID 0x8000000a.0 EDX bit 0), vnmi"),
        ] {
            let mut guest = print();
            guest.cpuid.push(missing);
            guest.validate().unwrap();
            let err = guest.check(&print()).unwrap_err().to_string();
            assert!(err.contains(want), "{err}");
            guest.check(&guest).unwrap();
        }
    }

    #[test]
    fn state_that_the_host_keeps_elsewhere_is_refused() {
        // Protection keys: processors without AVX-512 keep them at another place than those with it.
        let with = |size, offset| {
            let mut print = print();
            print.cpuid.push(leaf(0xd, 9, [size, offset, 0, 0]));
            print
        };
        with(8, 832).check(&with(8, 832)).unwrap();
        print().check(&with(8, 2432)).unwrap();
        let say = |host: Fingerprint| with(8, 832).check(&host).unwrap_err().to_string();
        let of = "component 9 of the processor state that XSAVE keeps: found";
        assert_eq!(say(with(8, 2432)), format!("{of} 8 bytes at 2432, needed 8 bytes at 832"));
        assert_eq!(say(print()), format!("{of} 0 bytes at 0, needed 8 bytes at 832"));
    }

    #[test]
    fn a_missing_capability_is_named() {
        let host = Fingerprint { capabilities: vec!["irqchip-split".into()], ..print() };
        assert_eq!(refusal(&host), "the KVM capability xcrs: found irqchip-split");
        let host = Fingerprint { capabilities: Vec::new(), ..print() };
        assert_eq!(refusal(&host), "the KVM capability irqchip-split: found none");
    }

    #[test]
    fn another_clock_rate_needs_scaling() {
        let mut host = Fingerprint { tsc_khz: 2_000_501, ..print() };
        assert!(refusal(&host).starts_with("the time-stamp counter's rate: found 2000501 kHz"));
        host.capabilities.push(TSC_SCALING.into());
        print().check(&host).unwrap();
    }

    #[test]
    fn another_machine_is_refused_by_device_and_disk() {
        let disk = DiskPrint { size: 4096, read_only: false };
        let print = Fingerprint { devices: vec!["serial".into()], disks: vec![disk], ..print() };
        print.check_machine(&["serial".into()], &[disk]).unwrap();
        let say =
            |devices: &[String], disks: &[DiskPrint]| print.check_machine(devices, disks).unwrap_err().to_string();
        assert_eq!(say(&[], &[disk]), "the machine's devices: found none, needed serial");
        assert_eq!(say(&["serial".into()], &[]), "disk 0: found none, needed 4096 bytes");
        let other = DiskPrint { size: 8192, read_only: true };
        assert_eq!(say(&["serial".into()], &[other]), "disk 0: found 8192 bytes, read-only, needed 4096 bytes");
    }
}
