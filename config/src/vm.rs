//! What one machine is made of: [`VmConfig`] as it goes over the control socket, [`VmSpec`] once it is known to make
//! sense. Files are named by their place in the list of descriptors that come beside the packet; the VMM opens
//! nothing by path.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The format of [`VmConfig`]; both sides come from one build, so any other number is a mixed installation.
pub const VM_CONFIG_VERSION: u32 = 3;
/// The most vCPUs of a machine.
pub const MAX_VCPUS: u32 = 32;
/// The least memory of a machine in bytes.
pub const MIN_MEMORY: u64 = 32 << 20;
/// The most memory of a machine in bytes.
pub const MAX_MEMORY: u64 = 1 << 40;
/// Guest memory comes in steps of this many bytes, one large page.
pub const MEMORY_STEP: u64 = 2 << 20;
/// The longest kernel command line in bytes, without its final zero (`COMMAND_LINE_SIZE` 2048 of the kernel's
/// arch/x86/include/asm/setup.h).
pub const MAX_CMDLINE: usize = 2047;
/// The most disks of a machine.
pub const MAX_DISKS: usize = 16;
/// The most layers below one disk's top; all layers of all disks must fit one packet's descriptors.
pub const MAX_LAYERS: usize = 200;

/// A place in the list of descriptors beside the configuration packet.
pub type FdIndex = u32;

/// The configuration packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`VM_CONFIG_VERSION`].
    pub version: u32,
    /// The machine's name in logs.
    pub id: String,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of [`MEMORY_STEP`] between [`MIN_MEMORY`] and [`MAX_MEMORY`].
    pub memory: u64,
    /// `/dev/kvm`.
    pub kvm: FdIndex,
    /// What that answers to KVM_GET_SUPPORTED_CPUID: a file of `struct kvm_cpuid_entry2` (40 bytes; the kernel's
    /// arch/x86/include/uapi/asm/kvm.h), one behind the other. The VMM does not ask itself, because KVM keeps a whole
    /// processor for the answer, and the rest of a machine's building waits for that.
    pub cpuid: FdIndex,
    /// `/dev/userfaultfd`, for the barrier that holds writers back while a snapshot is taken; none: the host lacks it.
    pub userfault: Option<FdIndex>,
    /// How the machine comes to life.
    pub start: StartConfig,
    /// Disks in order: the first is /dev/vda of a Linux guest.
    pub disks: Vec<DiskConfig>,
    /// Where the serial console reads and writes.
    pub console: ConsoleConfig,
    /// The walls around the VMM.
    pub jail: JailConfig,
    /// Log level of the VMM as `tracing` names it: `error`, `warn`, `info`, `debug`, `trace`. The log goes to stderr.
    pub log_level: String,
}

/// How a machine comes to life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartConfig {
    /// It boots a kernel.
    Boot(BootConfig),
    /// It goes on where a RAM snapshot was taken. [`VmConfig::vcpus`] and [`VmConfig::memory`] are those of the snapshot.
    Restore(RestoreConfig),
}

/// The unpacked form of a RAM snapshot (`ovms_state`). All of it is hostile: it may come from a registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// Head and sections, opened read-only.
    pub state: FdIndex,
    /// The guest's memory, [`VmConfig::memory`] bytes from guest address 0 up without the hole below 4 GiB, sparse, opened
    /// read-only. It is mapped private and never written.
    pub memory: FdIndex,
    /// The working set of an earlier restore, which is prefetched; none: nobody has recorded one.
    pub working_set: Option<FdIndex>,
    /// An empty file, opened for reading and writing, into which this restore records its working set.
    pub record_working_set: Option<FdIndex>,
    /// Lock in RAM what the guest makes its own of the memory (`mlock_required`).
    pub mlock: bool,
}

/// What is booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// bzImage or ELF (64-bit entry or PVH note).
    pub kernel: FdIndex,
    /// Initial RAM disk.
    pub initrd: Option<FdIndex>,
    /// Kernel command line.
    pub cmdline: String,
}

/// One disk: a table that says which layer holds what, the layers, and a writable top.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The table of `ovms_disk`.
    pub table: FdIndex,
    /// The layers in the table's order, base first, opened read-only.
    pub layers: Vec<FdIndex>,
    /// Tops that were frozen and lie below the writable one, oldest first, opened read-only.
    pub frozen: Vec<TopConfig>,
    /// The writable top: data and map.
    pub top: TopConfig,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    pub serial: String,
}

/// A top of a disk, writable or frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopConfig {
    /// The data file.
    pub data: FdIndex,
    /// The map file.
    pub map: FdIndex,
}

/// The ends of the serial console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Read by the guest; none: nothing ever comes.
    pub input: Option<FdIndex>,
    /// Written by the guest; none: output is dropped.
    pub output: Option<FdIndex>,
}

/// The walls that the VMM puts around itself once it holds its descriptors. Its other namespaces (pid, ipc, uts) it was
/// born in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// User id to become; not 0.
    pub uid: u32,
    /// Group id to become; not 0.
    pub gid: u32,
    /// Mount namespace to join before privileges go, an empty directory: until then it is in the engine's.
    pub root: FdIndex,
    /// Network namespace to join before privileges go: until then it is in the engine's.
    pub netns: FdIndex,
    /// Host name inside the VMM's own UTS namespace.
    pub hostname: String,
    /// `RLIMIT_FSIZE` in bytes: how far the disk tops may grow.
    pub max_file_size: u64,
    /// `RLIMIT_NOFILE`.
    pub max_open_files: u64,
}

/// Why a configuration makes no machine.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VmConfigError {
    /// Another build's configuration.
    #[error("the configuration has version {0}, this VMM reads {VM_CONFIG_VERSION}: install one version of ovms")]
    Version(u32),
    /// Number of vCPUs.
    #[error("a machine has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u32),
    /// Amount of memory.
    #[error("a machine has 32 MiB to 1 TiB of memory in steps of 2 MiB, not {0} bytes")]
    Memory(u64),
    /// The command line.
    #[error("the kernel command line has {0} bytes, at most {MAX_CMDLINE} are possible")]
    CmdlineLength(usize),
    /// The command line.
    #[error("the kernel command line holds a zero byte or a line break")]
    CmdlineCharacter,
    /// A descriptor that is not there.
    #[error("{what} names descriptor {index} of {count}")]
    Descriptor {
        /// The field.
        what: String,
        /// The index it holds.
        index: FdIndex,
        /// How many came.
        count: usize,
    },
    /// Number of disks.
    #[error("a machine has at most {MAX_DISKS} disks, not {0}")]
    Disks(usize),
    /// Number of layers.
    #[error("disk {disk} has {layers} layers, at most {MAX_LAYERS} are possible")]
    Layers {
        /// Which disk.
        disk: usize,
        /// How many layers.
        layers: usize,
    },
    /// A disk's serial number.
    #[error("the serial number of disk {0} is longer than 20 bytes or not ASCII")]
    Serial(usize),
    /// Root in the jail.
    #[error("the VMM may not run as user or group 0")]
    Root,
}

/// A configuration that makes sense: every bound holds and every descriptor is there.
#[derive(Clone, Debug)]
pub struct VmSpec {
    config: VmConfig,
}

impl VmSpec {
    /// Checks a configuration that came with `fds` descriptors.
    ///
    /// # Errors
    /// [`VmConfigError`] for the first thing that is wrong.
    pub fn new(config: VmConfig, fds: usize) -> Result<Self, VmConfigError> {
        if config.version != VM_CONFIG_VERSION {
            return Err(VmConfigError::Version(config.version));
        }
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(VmConfigError::Vcpus(config.vcpus));
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&config.memory) || !config.memory.is_multiple_of(MEMORY_STEP) {
            return Err(VmConfigError::Memory(config.memory));
        }
        if let StartConfig::Boot(boot) = &config.start {
            check_cmdline(&boot.cmdline)?;
        }
        if config.jail.uid == 0 || config.jail.gid == 0 {
            return Err(VmConfigError::Root);
        }
        check_disks(&config.disks)?;
        for (what, index) in descriptors(&config) {
            if index as usize >= fds {
                return Err(VmConfigError::Descriptor { what, index, count: fds });
            }
        }
        Ok(Self { config })
    }

    /// The kernel command line; empty for a machine that is restored.
    pub fn cmdline(&self) -> &str {
        match &self.config.start {
            StartConfig::Boot(boot) => &boot.cmdline,
            StartConfig::Restore(_) => "",
        }
    }

    /// The configuration that was checked.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }
}

/// Checks a kernel command line: also used where an image is built and where a container is created, so that the
/// error comes early.
///
/// # Errors
/// [`VmConfigError::CmdlineLength`], [`VmConfigError::CmdlineCharacter`].
pub fn check_cmdline(cmdline: &str) -> Result<(), VmConfigError> {
    if cmdline.len() > MAX_CMDLINE {
        return Err(VmConfigError::CmdlineLength(cmdline.len()));
    }
    if cmdline.contains(['\0', '\n', '\r']) {
        return Err(VmConfigError::CmdlineCharacter);
    }
    Ok(())
}

fn check_disks(disks: &[DiskConfig]) -> Result<(), VmConfigError> {
    if disks.len() > MAX_DISKS {
        return Err(VmConfigError::Disks(disks.len()));
    }
    for (index, disk) in disks.iter().enumerate() {
        let layers = disk.layers.len().saturating_add(disk.frozen.len());
        if layers > MAX_LAYERS {
            return Err(VmConfigError::Layers { disk: index, layers });
        }
        if disk.serial.len() > 20 || !disk.serial.is_ascii() {
            return Err(VmConfigError::Serial(index));
        }
    }
    Ok(())
}

/// Every descriptor that the configuration names, with the field that names it.
fn descriptors(config: &VmConfig) -> Vec<(String, FdIndex)> {
    let always = [
        ("kvm", config.kvm),
        ("cpuid", config.cpuid),
        ("jail.root", config.jail.root),
        ("jail.netns", config.jail.netns),
    ];
    let mut all: Vec<_> = always.map(|(what, index)| (what.to_owned(), index)).into();
    let mut optional = vec![
        ("userfault", config.userfault),
        ("console.input", config.console.input),
        ("console.output", config.console.output),
    ];
    match &config.start {
        StartConfig::Boot(boot) => optional.extend([("boot.kernel", Some(boot.kernel)), ("boot.initrd", boot.initrd)]),
        StartConfig::Restore(restore) => optional.extend([
            ("restore.state", Some(restore.state)),
            ("restore.memory", Some(restore.memory)),
            ("restore.working_set", restore.working_set),
            ("restore.record_working_set", restore.record_working_set),
        ]),
    }
    all.extend(optional.into_iter().filter_map(|(what, index)| index.map(|index| (what.to_owned(), index))));
    for (number, disk) in config.disks.iter().enumerate() {
        all.push((format!("disks[{number}].table"), disk.table));
        for (place, top) in disk.frozen.iter().map(|top| ("frozen", top)).chain([("top", &disk.top)]) {
            all.push((format!("disks[{number}].{place}.data"), top.data));
            all.push((format!("disks[{number}].{place}.map"), top.map));
        }
        all.extend(disk.layers.iter().map(|layer| (format!("disks[{number}].layers"), *layer)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            version: VM_CONFIG_VERSION,
            id: "vm1".into(),
            vcpus: 2,
            memory: 512 << 20,
            kvm: 0,
            cpuid: 0,
            userfault: None,
            start: StartConfig::Boot(BootConfig { kernel: 1, initrd: None, cmdline: "console=ttyS0".into() }),
            disks: vec![DiskConfig {
                table: 2,
                layers: vec![3],
                frozen: Vec::new(),
                top: TopConfig { data: 4, map: 5 },
                read_only: false,
                serial: "vda".into(),
            }],
            console: ConsoleConfig::default(),
            jail: JailConfig {
                uid: 1000,
                gid: 1000,
                root: 0,
                netns: 0,
                hostname: "vm1".into(),
                max_file_size: 1 << 40,
                max_open_files: 512,
            },
            log_level: "info".into(),
        }
    }

    fn boot(config: &mut VmConfig, cmdline: String) {
        config.start = StartConfig::Boot(BootConfig { kernel: 1, initrd: None, cmdline });
    }

    #[test]
    fn a_sound_configuration_is_taken() {
        assert!(VmSpec::new(config(), 6).is_ok());
    }

    #[test]
    fn each_bound_is_kept() {
        type Change = fn(&mut VmConfig);
        let cases: [(Change, &str); 13] = [
            (|c| c.version = 9, "version 9"),
            (|c| c.vcpus = 0, "not 0"),
            (|c| c.vcpus = 33, "not 33"),
            (|c| c.memory = (32 << 20) - 1, "MiB"),
            (|c| c.memory += 4096, "steps of 2 MiB"),
            (|c| boot(c, "x".repeat(2048)), "2048 bytes"),
            (|c| boot(c, "a\nb".into()), "line break"),
            (
                |c| c.disks[0].frozen = vec![TopConfig { data: 4, map: 7 }],
                "disks[0].frozen.map names descriptor 7 of 6",
            ),
            (
                |c| {
                    let restore = RestoreConfig {
                        state: 1,
                        memory: 8,
                        working_set: None,
                        record_working_set: None,
                        mlock: false,
                    };
                    c.start = StartConfig::Restore(restore);
                },
                "restore.memory names descriptor 8 of 6",
            ),
            (|c| c.cpuid = 6, "cpuid names descriptor 6 of 6"),
            (|c| c.disks[0].layers = vec![9], "disks[0].layers names descriptor 9 of 6"),
            (|c| c.disks[0].serial = "x".repeat(21), "disk 0"),
            (|c| c.jail.uid = 0, "group 0"),
        ];
        for (change, expected) in cases {
            let mut config = config();
            change(&mut config);
            let err = VmSpec::new(config, 6).unwrap_err().to_string();
            assert!(err.contains(expected), "{err} lacks {expected}");
        }
    }
}
