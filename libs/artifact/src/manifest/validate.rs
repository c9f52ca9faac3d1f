//! Judges a manifest's values, field by field, and collects everything that is wrong.

use std::collections::BTreeSet;
use std::fmt;

use time::format_description::well_known::Rfc3339;
use time::OffsetDateTime;

use super::{Device, DiskFormat, Manifest, Ref};
use crate::media;

/// Longest kernel command line in bytes: x86's COMMAND_LINE_SIZE (arch/x86/include/asm/setup.h) without its NUL.
pub const MAX_CMDLINE: usize = 2047;

/// Most disk layers of an image: the same as a machine's (config, `MAX_LAYERS`).
const MAX_DISK_LAYERS: usize = 200;
/// Most devices of a manifest: they must fit one PCI bus beside ours.
const MAX_DEVICES: usize = 16;
/// Longest name, version, device name.
const MAX_NAME: usize = 255;
/// Most vCPUs of a machine.
const MAX_VCPUS: u32 = 32;
/// Least guest memory, 32 MiB.
const MIN_MEMORY: u64 = 32 << 20;
/// Guest-physical addresses end here: 46 bits, what the smallest supported CPUs translate.
const ADDRESS_END: u64 = 1 << 46;
/// A PCI BAR is at least a page here, so that it can be mapped.
const PAGE: u64 = 4096;

/// One field that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The field, as `diskLayers[1].format`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

/// Everything that is wrong with a manifest; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldErrors(pub Vec<FieldError>);

impl fmt::Display for FieldErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for FieldErrors {}

/// Collects errors under the field names of the manifest.
#[derive(Default)]
struct Problems(Vec<FieldError>);

impl Problems {
    fn add(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        self.0.push(FieldError { field: field.into(), problem: problem.into() });
    }

    fn text(&mut self, field: &str, text: &str) {
        if text.is_empty() {
            self.add(field, "must not be empty");
        } else if text.len() > MAX_NAME {
            self.add(field, format!("has {} bytes, more than the {MAX_NAME} allowed", text.len()));
        } else if text.chars().any(char::is_control) {
            self.add(field, "must not hold control characters");
        }
    }

    fn reference(&mut self, field: &str, reference: &Ref) {
        match reference {
            Ref::BadDigest(text) => {
                let text: String = text.chars().take(100).collect();
                self.add(
                    field,
                    format!("\"{text}\" is not a digest: \"sha256:\" and 64 lower-case hexadecimal digits are wanted"),
                );
            }
            Ref::File(path) if path.as_os_str().is_empty() => self.add(field, "must not be empty"),
            _ => {}
        }
    }
}

impl Manifest {
    /// Judges every value of the manifest.
    ///
    /// # Errors
    /// All that is wrong, by field.
    pub fn validate(&self) -> Result<(), FieldErrors> {
        let mut problems = Problems::default();
        self.check_head(&mut problems);
        self.check_boot(&mut problems);
        self.check_disks(&mut problems);
        self.check_devices(&mut problems);
        self.check_metadata(&mut problems);
        self.check_defaults(&mut problems);
        match problems.0.is_empty() {
            true => Ok(()),
            false => Err(FieldErrors(problems.0)),
        }
    }

    /// The `ref` fields that are not digests yet, with their field names: what a build or a pull still has to pin.
    pub fn unpinned(&self) -> Vec<(String, Ref)> {
        let mut refs = Vec::new();
        let mut take = |field: String, reference: &Ref| {
            if reference.digest().is_none() {
                refs.push((field, reference.clone()));
            }
        };
        if let Some(kernel) = &self.kernel {
            take("kernel.ref".to_owned(), &kernel.reference);
        }
        if let Some(initrd) = &self.initrd {
            take("initrd.ref".to_owned(), &initrd.reference);
        }
        for (i, disk) in self.disk_layers.iter().enumerate() {
            take(format!("diskLayers[{i}].ref"), &disk.reference);
        }
        if let Some(ram) = &self.ram_snapshot {
            take("ramSnapshot.ref".to_owned(), &ram.reference);
        }
        refs
    }

    /// What the manifest asks for and this version of ovms does not have, by field. Such a manifest is valid, and an image of
    /// it can be built, but no machine of it is started.
    pub fn unsupported(&self) -> Vec<FieldError> {
        let mut problems = Problems::default();
        for (i, device) in self.devices.iter().enumerate() {
            let (name, kind) = (&device.name, &device.kind);
            problems.add(format!("devices[{i}]"), format!("this version has no device of type {kind} (\"{name}\")"));
        }
        if self.kernel.is_none() && self.ram_snapshot.is_none() {
            problems.add("kernel", "missing, and this version does not boot firmware from a disk");
        }
        if self.container_mode {
            problems.add("containerMode", "this version has no container mode");
        }
        problems.0
    }

    fn check_head(&self, problems: &mut Problems) {
        if self.schema_version != 1 {
            problems.add("schemaVersion", format!("{} is unknown, this runtime reads 1", self.schema_version));
        }
        if media::canonical(&self.media_type) != media::MANIFEST {
            let found: String = self.media_type.chars().take(100).collect();
            problems.add("mediaType", format!("\"{found}\" is not \"{}\"", media::MANIFEST));
        }
        problems.text("name", &self.name);
        problems.text("version", &self.version);
    }

    fn check_boot(&self, problems: &mut Problems) {
        if let Some(kernel) = &self.kernel {
            problems.reference("kernel.ref", &kernel.reference);
            if let Some(problem) = cmdline_problem(kernel.args.as_deref().unwrap_or_default()) {
                problems.add("kernel.args", problem);
            }
        }
        if let Some(initrd) = &self.initrd {
            problems.reference("initrd.ref", &initrd.reference);
            if self.kernel.is_none() {
                problems.add("initrd", "needs a kernel: add kernel.ref, or drop the initrd");
            }
        }
        if let Some(ram) = &self.ram_snapshot {
            problems.reference("ramSnapshot.ref", &ram.reference);
        }
        if self.kernel.is_none() && self.disk_layers.is_empty() {
            problems.add("kernel", "missing, and there is no disk layer to boot from either");
        }
    }

    fn check_disks(&self, problems: &mut Problems) {
        if self.disk_layers.len() > MAX_DISK_LAYERS {
            let n = self.disk_layers.len();
            problems.add("diskLayers", format!("has {n} layers, more than the {MAX_DISK_LAYERS} allowed"));
            return;
        }
        for (i, disk) in self.disk_layers.iter().enumerate() {
            problems.reference(&format!("diskLayers[{i}].ref"), &disk.reference);
            if disk.format == DiskFormat::Ovfms {
                problems.add(format!("diskLayers[{i}].format"), "ovfms is not supported, use qcow2 or raw");
            }
            if disk.size == Some(0) {
                problems.add(format!("diskLayers[{i}].size"), "must not be 0");
            }
            if disk.size.is_some_and(|s| s > i64::MAX as u64) {
                problems.add(format!("diskLayers[{i}].size"), "is larger than a file can be");
            }
        }
    }

    fn check_devices(&self, problems: &mut Problems) {
        if self.devices.len() > MAX_DEVICES {
            let n = self.devices.len();
            problems.add("devices", format!("has {n} devices, more than the {MAX_DEVICES} allowed"));
            return;
        }
        let mut names = BTreeSet::new();
        let mut ranges: Vec<(u64, u64, &str)> = Vec::new();
        for (i, device) in self.devices.iter().enumerate() {
            let field = |name: &str| format!("devices[{i}].{name}");
            problems.text(&field("name"), &device.name);
            if !names.insert(device.name.as_str()) {
                problems.add(field("name"), format!("\"{}\" is used twice", device.name));
            }
            if device.kind != "ivshmem" {
                let kind: String = device.kind.chars().take(100).collect();
                problems.add(field("type"), format!("this runtime has no device \"{kind}\", only \"ivshmem\""));
                continue;
            }
            if let Some((start, end)) = check_ivshmem(device, &field, problems) {
                if let Some((.., other)) = ranges.iter().find(|(s, e, _)| start < *e && *s < end) {
                    problems.add(field("mmio_addr"), format!("overlaps the memory of device \"{other}\""));
                }
                ranges.push((start, end, &device.name));
            }
        }
    }

    fn check_metadata(&self, problems: &mut Problems) {
        let Some(metadata) = &self.metadata else { return };
        if let Some(created) = &metadata.created {
            if OffsetDateTime::parse(created, &Rfc3339).is_err() {
                let text: String = created.chars().take(40).collect();
                problems.add("metadata.created", format!("\"{text}\" is not an RFC 3339 time"));
            }
        }
        let Some(platform) = &metadata.platform else { return };
        if let Some(arch) = platform.arch.as_deref().filter(|a| !matches!(*a, "x86_64" | "amd64")) {
            let arch: String = arch.chars().take(40).collect();
            problems.add("metadata.platform.arch", format!("{arch} is not supported, this runtime runs x86_64"));
        }
        if platform.uefi == Some(true) {
            problems.add("metadata.platform.uefi", "UEFI boot is not supported, use a BIOS image or a kernel");
        }
    }

    fn check_defaults(&self, problems: &mut Problems) {
        let Some(defaults) = &self.defaults else { return };
        if let Some(vcpus) = defaults.vcpus.filter(|n| !(1..=MAX_VCPUS).contains(n)) {
            problems.add("io.ovms.vcpus", format!("{vcpus} is out of range, 1 to {MAX_VCPUS} are possible"));
        }
        if let Some(memory) = defaults.memory_bytes {
            if memory < MIN_MEMORY {
                problems.add("io.ovms.memoryBytes", format!("{memory} is too little, {MIN_MEMORY} is the least"));
            } else if memory > ADDRESS_END / 2 {
                problems.add("io.ovms.memoryBytes", format!("{memory} is beyond what a machine can address"));
            }
        }
    }
}

/// What is wrong with a kernel command line, if anything.
pub(crate) fn cmdline_problem(args: &str) -> Option<String> {
    if args.len() > MAX_CMDLINE {
        return Some(format!("the command line has {} bytes, a kernel takes {MAX_CMDLINE}", args.len()));
    }
    if args.chars().any(|c| c.is_control() && c != '\t') {
        return Some("the command line must not hold control characters or line ends".to_owned());
    }
    None
}

/// Checks an ivshmem device and returns the range of its memory where it is fixed.
fn check_ivshmem(device: &Device, field: &dyn Fn(&str) -> String, problems: &mut Problems) -> Option<(u64, u64)> {
    let size = match device.size {
        None => {
            problems.add(field("size"), "missing: an ivshmem device needs the size of its memory");
            None
        }
        Some(size) if !size.is_power_of_two() || !(PAGE..=ADDRESS_END / 4).contains(&size) => {
            problems.add(field("size"), format!("{size} is not a power of two of at least {PAGE} (it is a PCI BAR)"));
            None
        }
        Some(size) => Some(size),
    };
    let start = match device.address() {
        Ok(start) => start?,
        Err(text) => {
            let text: String = text.chars().take(40).collect();
            problems.add(field("mmio_addr"), format!("\"{text}\" is not \"0x\" and hexadecimal digits"));
            return None;
        }
    };
    let size = size?;
    if !start.is_multiple_of(size) || start == 0 {
        problems.add(field("mmio_addr"), format!("{start:#x} is not a multiple of the size {size:#x}"));
        return None;
    }
    match start.checked_add(size).filter(|end| *end <= ADDRESS_END) {
        Some(end) => Some((start, end)),
        None => {
            problems.add(field("mmio_addr"), format!("{start:#x} is beyond the 46 bits of guest addresses"));
            None
        }
    }
}
