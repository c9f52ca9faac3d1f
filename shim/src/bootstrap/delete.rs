//! `delete`: cleans up after a server that is gone, from what lies on disk alone. containerd runs it after every
//! container, so finding nothing is the usual case, and running it twice changes nothing.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{env, fs};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use ovms_config::Settings;
use ovms_engine::{Engine, ExitInfo};

use super::note::Note;
use super::start::ADDRESS_FILE;
use crate::cli::Args;
use crate::error::{Error, Result};
use crate::events::timestamp;
use crate::oci;

/// 128 + SIGKILL: what a machine ends with whose server was killed.
const KILLED: u32 = 137;

/// Ends and removes the container's machine, runs its poststop hooks unless the server has, removes the socket, and
/// writes a `DeleteResponse` to standard output. A later container of the same id is left alone. Settings that cannot be
/// read are told on standard error, which containerd logs; what `start` has noted then stands for them.
///
/// # Errors
/// When something cannot be removed; containerd tries again.
pub fn delete(args: &Args, settings: Result<Settings>) -> Result<()> {
    let bundle = bundle(args)?;
    // Here first: while it is being removed, the bundle has another path than a later container's.
    let note = bundle.as_deref().and_then(|bundle| Note::read(Path::new(".")).or_else(|| Note::read(bundle)));
    let engine = Engine::new(usable(settings, note.as_ref()));
    let instance = note.as_ref().map(|note| note.instance.as_str());
    let record = engine.load(&args.namespace, &args.id).ok().filter(|record| record.instance.as_deref() == instance);
    let pid = record.and_then(|record| record.process).map(|process| process.pid);
    let exit = engine.cleanup(&args.namespace, &args.id, instance)?;
    // The path may be a later container's by now, and so are its hooks and its socket.
    if let Some(bundle) = bundle.filter(|bundle| Note::read(bundle) == note) {
        oci::read_hooks(&bundle).poststop(&args.id);
        if let Some(socket) = socket_of(&bundle) {
            let _ = fs::remove_file(socket);
        }
    }
    let bytes =
        response(pid, exit.as_ref()).write_to_bytes().map_err(|e| Error::caused("cannot encode the answer", e))?;
    io::stdout().write_all(&bytes).map_err(|e| Error::caused("cannot write the answer to stdout", e))
}

/// The bundle that is meant; `None` if it is gone. containerd starts this program in it, and the path may be a later
/// container's by now.
fn bundle(args: &Args) -> Result<Option<PathBuf>> {
    let here = match env::current_dir() {
        Ok(here) => here,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::caused("cannot tell the bundle", error)),
    };
    Ok(Some(args.bundle.clone().unwrap_or(here)))
}

/// The settings, or what is known without them.
fn usable(settings: Result<Settings>, note: Option<&Note>) -> Settings {
    let mut settings = settings.unwrap_or_else(|error| {
        let instead = if note.is_some() { "as noted at its start" } else { "by the default settings" };
        eprintln!("{}: the container is cleaned up {instead}", error.chain());
        Settings::default()
    });
    // A machine is where its engine put it, whatever the settings say by now.
    if let Some(note) = note {
        settings.paths.runtime.clone_from(&note.runtime);
    }
    settings
}

/// What the server's address file says; nothing if the bundle is gone.
fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
    address.trim().strip_prefix("unix://").map(PathBuf::from).filter(|path| path.is_absolute())
}

fn response(pid: Option<u32>, exit: Option<&ExitInfo>) -> DeleteResponse {
    DeleteResponse {
        pid: pid.unwrap_or_default(),
        exit_status: exit.map_or(KILLED, |exit| exit.status),
        exited_at: MessageField::some(timestamp(exit.map_or_else(SystemTime::now, |exit| exit.at))),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovms_engine::ExitReason;

    #[test]
    fn response_repeats_a_known_exit_and_says_killed_for_an_unknown_one() {
        let exit = ExitInfo { status: 0, at: SystemTime::UNIX_EPOCH, reason: ExitReason::PowerOff, oom_killed: false };
        let known = response(Some(7), Some(&exit));
        assert_eq!((known.pid, known.exit_status, known.exited_at.seconds), (7, 0, 0));
        let unknown = response(None, None);
        assert_eq!((unknown.pid, unknown.exit_status), (0, 137));
        assert!(unknown.exited_at.seconds > 0);
    }

    #[test]
    fn socket_of_a_bundle_is_its_address() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(socket_of(dir.path()), None);
        fs::write(dir.path().join(ADDRESS_FILE), "unix:///run/containerd/s/abc").unwrap();
        assert_eq!(socket_of(dir.path()), Some("/run/containerd/s/abc".into()));
    }
}
