//! Going on where a RAM snapshot was taken, instead of booting: whether, with what, and the working set that such a start
//! records for the next ones.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::thread;

use nix::sys::memfd::{memfd_create, MFdFlags};
use ovms_bundle::{Ram, RamFiles, Record};
use ovms_config::settings::RamPolicy;
use ovms_config::Settings;
use ovms_state::{Head, SnapshotError, StateFile, WorkingSet};

use crate::error::{Error, Kind, Result};
use crate::launch::bundle_error;
use crate::shared::Inner;
use crate::spec::{BootChoice, CreateSpec};

/// Where to go on.
#[derive(Debug)]
pub(crate) struct Resume {
    pub(crate) ram: Ram,
    pub(crate) files: RamFiles,
    /// Hostile but for its bounds.
    pub(crate) head: Head,
}

impl Resume {
    /// What the machine of this record goes on from; `None`: it boots, since it carries no RAM or its user wants so.
    pub(crate) fn open(record: &Record, spec: &CreateSpec, settings: &Settings) -> Result<Option<Self>> {
        let carries = record.ram.is_some() || record.manifest.ram_snapshot.is_some();
        if !carries || spec.boot == BootChoice::Cold {
            return Ok(None);
        }
        check_policy(settings.ram.policy)?;
        let ram = record.ram.clone().ok_or_else(|| {
            let message =
                "the image carries RAM that was not unpacked; io.ovms.boot=cold (--boot cold) boots it instead";
            Error::new(Kind::FailedPrecondition, message)
        })?;
        let files = RamFiles::open(&ram).map_err(bundle_error)?;
        let unusable = |err: SnapshotError| {
            let elsewhere = matches!(err, SnapshotError::Epoch(_) | SnapshotError::Incompatible(_));
            let err =
                Error::new(Kind::FailedPrecondition, format!("the RAM {} cannot be resumed", ram.digest)).because(err);
            if elsewhere {
                err.incompatible()
            } else {
                err
            }
        };
        let head = StateFile::head(&files.state).map_err(unusable)?;
        let size = files.memory.metadata().map_err(Error::io("the RAM file cannot be read"))?.len();
        let (needed, most) = (head.memory, settings.ram.max_memory);
        if needed > most {
            let message = format!("the RAM has {needed} bytes of memory, ovms.toml allows {most}: [ram] max_memory");
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        if size != needed {
            let message = format!("the RAM file {} has {size} bytes, its head says {needed}", ram.memory.display());
            return Err(Error::new(Kind::Internal, message));
        }
        if spec.extra_kernel_args.as_deref().is_some_and(|args| !args.trim().is_empty()) {
            tracing::warn!(
                id = spec.id,
                "the kernel runs already: kernel arguments given with a RAM snapshot have no effect"
            );
        }
        Ok(Some(Self { ram, files, head }))
    }
}

/// Whether this host resumes what comes with an image.
fn check_policy(policy: RamPolicy) -> Result<()> {
    let why = match policy {
        RamPolicy::Allow => return Ok(()),
        RamPolicy::Deny => "ovms.toml forbids to resume it ([ram] policy = \"deny\")",
        RamPolicy::Signed => {
            "ovms.toml wants it signed ([ram] policy = \"signed\"), and this version of ovms verifies no signatures of RAM"
        }
    };
    let message = format!(
        "the image carries RAM, and {why}: boot it from its disk with the annotation io.ovms.boot=cold, or change the policy"
    );
    Err(Error::new(Kind::FailedPrecondition, message))
}

/// A file for a VMM to record its working set into, in memory: no path, so nothing is left of one that dies.
pub(crate) fn recording() -> Option<File> {
    match memfd_create(c"working-set", MFdFlags::MFD_CLOEXEC) {
        Ok(file) => Some(file.into()),
        Err(err) => {
            tracing::warn!(%err, "no working set is recorded");
            None
        }
    }
}

/// Takes over what a VMM has recorded, unless somebody was faster. The VMM is in its guest's reach and keeps the file, so
/// what it holds is checked and written anew.
pub(crate) fn publish_working_set(inner: &Arc<Inner>, recorded: File) {
    let Some(path) = inner.origin.ram.as_ref().map(|ram| ram.working_set.clone()) else { return };
    let (id, memory) = (inner.id.clone(), inner.memory);
    let publish = move || {
        if path.exists() {
            return;
        }
        let set = match WorkingSet::read(&recorded, memory) {
            Ok(set) => set,
            Err(err) => return tracing::warn!(id, %err, "the VMM has recorded a working set that is none"),
        };
        let bytes = set.encode();
        let write = |file: &mut File| {
            let failed = |source| ovms_bundle::Error::Io { verb: "write", path: path.clone(), source };
            file.write_all(&bytes).map_err(failed)
        };
        match ovms_bundle::write_new(&path, write) {
            Ok(()) => tracing::info!(id, pages = set.pages(), path = %path.display(), "the working set was recorded"),
            // The snapshotter may have removed the RAM meanwhile.
            Err(err) => tracing::warn!(id, %err, "the working set cannot be kept"),
        }
    };
    // A disk may take its time, and the monitor has none.
    if let Err(err) = thread::Builder::new().name("ovms-set".into()).stack_size(128 << 10).spawn(publish) {
        tracing::warn!(%err, "the working set is not kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovms_bundle::{Manifest, RECORD_VERSION};

    fn record() -> Record {
        let ram = Ram {
            digest: "sha256:00".into(),
            parents: Vec::new(),
            state: "/no/state".into(),
            memory: "/no/memory".into(),
            working_set: "/no/set".into(),
            mlock: false,
        };
        Record {
            version: RECORD_VERSION,
            image: None,
            manifest: Manifest::new("test/image", "1"),
            kernel: None,
            initrd: None,
            disk: None,
            ram: Some(ram),
        }
    }

    fn open(record: &Record, boot: BootChoice, policy: RamPolicy) -> Result<Option<Resume>> {
        let mut settings = Settings::default();
        settings.ram.policy = policy;
        Resume::open(record, &CreateSpec { boot, ..CreateSpec::default() }, &settings)
    }

    #[test]
    fn a_cold_boot_and_a_record_without_ram_boot_under_every_policy() {
        let cold = Record { ram: None, ..record() };
        for policy in [RamPolicy::Allow, RamPolicy::Signed, RamPolicy::Deny] {
            assert!(open(&record(), BootChoice::Cold, policy).unwrap().is_none());
            assert!(open(&cold, BootChoice::Auto, policy).unwrap().is_none());
        }
    }

    #[test]
    fn open_against_policy_returns_the_key_and_the_annotation() {
        for (policy, key) in [(RamPolicy::Signed, "policy = \"signed\""), (RamPolicy::Deny, "policy = \"deny\"")] {
            let err = open(&record(), BootChoice::Auto, policy).unwrap_err();
            assert_eq!(err.kind(), Kind::FailedPrecondition);
            assert!(err.to_string().contains(key) && err.to_string().contains("io.ovms.boot=cold"), "{err}");
        }
    }

    #[test]
    fn open_missing_or_foreign_state_returns_its_path_or_digest() {
        let err = open(&record(), BootChoice::Auto, RamPolicy::Allow).unwrap_err();
        assert!(err.kind() == Kind::NotFound && err.chain().contains("/no/state"), "{}", err.chain());
        let dir = tempfile::tempdir().unwrap();
        let mut record = record();
        let ram = record.ram.as_mut().unwrap();
        (ram.state, ram.memory) = (dir.path().join("state"), dir.path().join("memory"));
        for path in [&ram.state, &ram.memory] {
            std::fs::write(path, "no snapshot").unwrap();
        }
        let err = open(&record, BootChoice::Auto, RamPolicy::Allow).unwrap_err();
        assert!(err.chain().contains("sha256:00"), "{}", err.chain());
        assert!(!err.is_incompatible());
    }
}
