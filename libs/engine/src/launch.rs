//! From a [`CreateSpec`] to the first packet: files opened, disk locked, everything named by its place in the list of
//! descriptors.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use ovms_bundle::{Bundle, DiskFiles, Holder, Manifest, MAX_FROZEN};
use ovms_config::vm::{
    check_cmdline, BootConfig, ConsoleConfig, DiskConfig, FdIndex, JailConfig, RestoreConfig, StartConfig, TopConfig,
    VmConfig, VM_CONFIG_VERSION,
};
use ovms_config::Settings;
use ovms_proto::channel::MAX_FDS;

use crate::ahead::{Ahead, HostFiles};
use crate::error::{Error, Kind, Result};
use crate::ram_lock::RamLock;
use crate::record;
use crate::restore::{self, Resume};
use crate::shared::Origin;
use crate::sizing::{settle, settle_resumed, Size};
use crate::spec::CreateSpec;

/// Descriptors that a VMM opens for itself: VM, vCPUs, eventfds and epoll instances of its devices.
const OWN_FILES: u64 = 512;
/// Bytes that the map of a disk's top may have beyond one for each 512 of the disk, and the least size limit.
const FILE_SLACK: u64 = 64 << 20;
/// Bytes of a RAM snapshot for each of the machine's memory: a chunk that changes while it is copied is written again, and
/// what it was before is dropped at the end.
const SNAPSHOT_ROOM: u64 = 4;
/// Where the kernel keeps what lets an unprivileged process have its userfaultfd.
const USERFAULT: &str = "/dev/userfaultfd";

/// The first packet.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) config: VmConfig,
    fds: Vec<OwnedFd>,
    pub(crate) size: Size,
    /// Data files of the tops that the descriptors lock.
    pub(crate) tops: Vec<PathBuf>,
    pub(crate) origin: Origin,
    /// The file that the VMM records its working set into.
    pub(crate) recording: Option<File>,
    pub(crate) ram_lock: Option<RamLock>,
}

impl Packet {
    /// Opens everything. The spec's stdin and stdout move into the packet. `uid` is filled in later.
    pub(crate) fn open(spec: &mut CreateSpec, ahead: Ahead, settings: &Settings) -> Result<Self> {
        let mut fds = FdList::default();
        let holder = Holder {
            text: format!("machine {}/{}, held by process {}", spec.namespace, spec.id, std::process::id()),
            socket: Some(record::socket(&settings.paths.runtime, &spec.namespace, &spec.id)),
        };
        let mut bundle = Bundle::open(&spec.bundle, holder.clone(), spec.read_only).map_err(bundle_error)?;
        check_manifest(&bundle.record.manifest)?;
        let mut origin = Origin {
            bundle: std::path::absolute(&spec.bundle).map_err(Error::io("the bundle's path cannot be used"))?,
            holder,
            writable: bundle.disk.as_ref().is_some_and(|disk| !disk.read_only),
            ram: None,
        };
        let Start { config: start, size, recording, ram_lock } = match Resume::open(&bundle.record, spec, settings)? {
            Some(resume) => {
                origin.ram = Some(resume.ram.clone());
                resume_start(resume, spec, settings, &mut fds)?
            }
            None => boot_start(&mut bundle, spec, settings, &mut fds)?,
        };
        let disk_size = bundle.record.disk.as_ref().map_or(0, |disk| disk.virtual_size);
        let tops = bundle.record.disk.iter().filter_map(|disk| disk.top.as_ref()).map(|top| top.data.clone()).collect();
        let disks: Vec<_> = bundle.disk.into_iter().map(|disk| disk_config(disk, &mut fds)).collect();
        let console = ConsoleConfig {
            input: spec.stdio.stdin.take().map(|fd| fds.push(fd)),
            output: spec.stdio.stdout.take().map(|fd| fds.push(fd)),
        };
        let HostFiles { kvm, cpuid, root, netns } = ahead.wait()?;
        let (kvm, cpuid, root, netns) = (fds.push(kvm), fds.push(cpuid), fds.push(root), fds.push(netns));
        let hostname = if spec.hostname.is_empty() { spec.id.clone() } else { spec.hostname.clone() };
        let jail = JailConfig {
            uid: 0,
            gid: 0,
            root,
            netns,
            hostname,
            max_file_size: disk_size
                .saturating_add(disk_size / 512)
                .max(size.memory.saturating_mul(SNAPSHOT_ROOM))
                .saturating_add(FILE_SLACK),
            max_open_files: fds.0.len() as u64 + OWN_FILES + 2 * MAX_FROZEN as u64,
        };
        let userfault = File::options().read(true).write(true).open(USERFAULT).ok().map(|file| fds.push(file));
        if fds.0.len() > MAX_FDS {
            let message = format!("the machine needs {} descriptors, at most {MAX_FDS} can be passed", fds.0.len());
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        let config = VmConfig {
            version: VM_CONFIG_VERSION,
            id: spec.id.clone(),
            vcpus: size.vcpus,
            memory: size.memory,
            kvm,
            cpuid,
            userfault,
            start,
            disks,
            console,
            jail,
            log_level: log_level(),
        };
        Ok(Self { config, fds: fds.0, size, tops, origin, recording, ram_lock })
    }

    /// The descriptors, in the order that the configuration names.
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }
}

/// Descriptors in the order of their numbers in the configuration.
#[derive(Default)]
struct FdList(Vec<OwnedFd>);

impl FdList {
    fn push(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        FdIndex::try_from(self.0.len() - 1).unwrap_or(FdIndex::MAX)
    }
}

/// How a machine comes to life, and what that settles.
struct Start {
    config: StartConfig,
    size: Size,
    recording: Option<File>,
    ram_lock: Option<RamLock>,
}

fn boot_start(bundle: &mut Bundle, spec: &mut CreateSpec, settings: &Settings, fds: &mut FdList) -> Result<Start> {
    let manifest = &bundle.record.manifest;
    let wishes = &mut spec.wishes;
    wishes.image_vcpus = wishes.image_vcpus.or(manifest.vcpus());
    wishes.image_memory = wishes.image_memory.or(manifest.memory_bytes());
    let size = settle(wishes, &settings.vm)?;
    let cmdline = join_cmdline(manifest.cmdline(), spec.extra_kernel_args.as_deref())?;
    let kernel = bundle.kernel.take().ok_or_else(|| {
        let message = "the image has no kernel, and this version of ovms does not boot firmware from a disk";
        Error::new(Kind::InvalidArgument, message)
    })?;
    let initrd = bundle.initrd.take().map(|file| fds.push(file));
    let config = StartConfig::Boot(BootConfig { kernel: fds.push(kernel), initrd, cmdline });
    Ok(Start { config, size, recording: None, ram_lock: None })
}

fn resume_start(resume: Resume, spec: &CreateSpec, settings: &Settings, fds: &mut FdList) -> Result<Start> {
    let Resume { ram, files, head } = resume;
    let size = settle_resumed(&spec.wishes, &settings.vm, head.vcpus, head.memory)?;
    let ram_lock = (ram.mlock && spec.lock_ram).then(|| RamLock::take(&files.memory, head.memory)).transpose()?;
    let recording = if files.working_set.is_none() { restore::recording() } else { None };
    let theirs = recording.as_ref().map(File::try_clone).transpose();
    let theirs = theirs.map_err(Error::io("the file for the working set cannot be shared"))?;
    let config = StartConfig::Restore(RestoreConfig {
        state: fds.push(files.state),
        memory: fds.push(files.memory),
        working_set: files.working_set.map(|file| fds.push(file)),
        record_working_set: theirs.map(|file| fds.push(file)),
        mlock: ram.mlock,
    });
    Ok(Start { config, size, recording, ram_lock })
}

/// Refuses what the image asks for and the machine would silently lack.
fn check_manifest(manifest: &Manifest) -> Result<()> {
    if manifest.container_mode {
        let message = "the image asks for container mode (containerMode), which this version of ovms does not have: build it without";
        return Err(Error::new(Kind::InvalidArgument, message));
    }
    let Some(device) = manifest.devices.first() else { return Ok(()) };
    let message = format!(
        "the image asks for the device {} of type {}, which this version of ovms does not have: build it without",
        device.name, device.kind
    );
    Err(Error::new(Kind::InvalidArgument, message))
}

fn disk_config(disk: DiskFiles, fds: &mut FdList) -> DiskConfig {
    DiskConfig {
        table: fds.push(disk.table),
        layers: disk.layers.into_iter().map(|layer| fds.push(layer)).collect(),
        frozen: disk
            .frozen
            .into_iter()
            .map(|top| TopConfig { data: fds.push(top.data), map: fds.push(top.map) })
            .collect(),
        top: TopConfig { data: fds.push(disk.top_data), map: fds.push(disk.top_map) },
        read_only: disk.read_only,
        serial: "vda".into(),
    }
}

fn join_cmdline(image: &str, extra: Option<&str>) -> Result<String> {
    let words = [image.trim(), extra.unwrap_or_default().trim()];
    let cmdline = words.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
    match check_cmdline(&cmdline) {
        Ok(()) => Ok(cmdline),
        Err(err) => {
            let message = "the image's kernel arguments and those given with it (io.ovms.kernel-args, --kernel-args) cannot be used";
            Err(Error::new(Kind::InvalidArgument, message).because(err))
        }
    }
}

pub(crate) fn bundle_error(err: ovms_bundle::Error) -> Error {
    Error::new(bundle_kind(&err), "the machine's files cannot be opened").because(err)
}

/// What a caller should make of a bundle's error.
pub(crate) fn bundle_kind(err: &ovms_bundle::Error) -> Kind {
    use ovms_bundle::Error as E;
    match err {
        E::InUse { .. } | E::NoTop(_) | E::Frozen { .. } | E::Cancelled => Kind::FailedPrecondition,
        E::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Kind::NotFound,
        E::Io { source, .. } if source.kind() == io::ErrorKind::DirectoryNotEmpty => Kind::FailedPrecondition,
        E::Record { .. } | E::Manifest(..) | E::Image(_) => Kind::InvalidArgument,
        _ => Kind::Internal,
    }
}

/// The VMM logs as much as this process does.
fn log_level() -> String {
    match tracing::level_filters::LevelFilter::current().into_level() {
        Some(level) => level.as_str().to_ascii_lowercase(),
        None => "warn".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_arguments_are_appended() {
        assert_eq!(join_cmdline("console=ttyS0 quiet ", Some(" debug")).unwrap(), "console=ttyS0 quiet debug");
        assert_eq!(join_cmdline("", None).unwrap(), "");
        assert_eq!(join_cmdline("", Some("debug")).unwrap(), "debug");
    }

    #[test]
    fn join_cmdline_too_long_returns_invalid_argument() {
        let err = join_cmdline(&"x".repeat(2000), Some(&"y".repeat(47))).unwrap_err();
        assert_eq!(err.kind(), Kind::InvalidArgument);
        assert!(err.chain().contains("2048 bytes, at most 2047"), "{}", err.chain());
    }

    #[test]
    fn check_manifest_with_what_is_not_there_returns_its_name() {
        let manifest = |extra: &str| {
            let text = format!(
                r#"{{"schemaVersion":1,"mediaType":"application/vnd.ovms.manifest.v1+json","name":"m","version":"1"{extra}}}"#
            );
            Manifest::parse(text.as_bytes()).unwrap()
        };
        check_manifest(&manifest("")).unwrap();
        let device = r#","devices":[{"type":"ivshmem","name":"mmio0","size":4096,"mmio_addr":"0x100000000"}]"#;
        let err = check_manifest(&manifest(device)).unwrap_err();
        assert!(err.to_string().contains("the device mmio0 of type ivshmem"), "{err}");
        let err = check_manifest(&manifest(r#","containerMode":true"#)).unwrap_err();
        assert!(err.to_string().contains("containerMode"), "{err}");
    }
}
