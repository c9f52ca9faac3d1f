//! `start`: bind first, then spawn the server with the listening socket as its standard input, then answer. A
//! connection that comes before the server runs waits in the socket's backlog.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, fs, io};

use ovms_config::Settings;

use super::note::Note;
use super::params::{self, Params};
use super::socket::{self, Bound};
use crate::cli::Args;
use crate::error::{Error, Result};
use crate::sys;

/// File in the bundle that holds the address: containerd 1.7 finds a running shim by it after its own restart.
pub(super) const ADDRESS_FILE: &str = "address";

/// Starts the server of a container and prints its address.
///
/// # Errors
/// When standard input makes no sense, or the socket or the process cannot be made.
pub fn start(args: &Args, settings: &Settings) -> Result<()> {
    let params = params::parse(&params::read_stdin()?, args, env::var("TTRPC_ADDRESS").ok())?;
    let path = socket::path(params.socket_dir.as_deref(), &args.address, &args.namespace, &args.id)?;
    let address = format!("unix://{}", path.display());
    match socket::bind(&path)? {
        Bound::Alive => write_address(&address)?,
        Bound::New(listener) => {
            let noted = Note::write(Path::new("."), &settings.paths.runtime).and_then(|()| write_address(&address));
            if let Err(error) = noted.and_then(|()| spawn(args, &params, &path, listener.into())) {
                // Nobody will ever listen there.
                let _ = fs::remove_file(&path);
                return Err(error);
            }
        }
    }
    let mut stdout = io::stdout();
    stdout
        .write_all(address.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|e| Error::caused("cannot write the address to stdout", e))
}

/// containerd starts this program in the bundle.
fn write_address(address: &str) -> Result<()> {
    let failed = |source| Error::caused(format!("cannot write the file {ADDRESS_FILE} in the bundle"), source);
    let unfinished = format!(".{ADDRESS_FILE}");
    fs::write(&unfinished, address).map_err(failed)?;
    fs::rename(&unfinished, ADDRESS_FILE).map_err(failed)
}

fn spawn(args: &Args, params: &Params, path: &Path, listener: OwnedFd) -> Result<()> {
    // containerd waits for the end of its pipes, so nothing but the three standard streams may be inherited.
    sys::close_on_exec_from(3).map_err(|e| Error::caused("cannot close inherited descriptors", e))?;
    let program = env::current_exe().map_err(|e| Error::caused("cannot find this program", e))?;
    let mut command = Command::new(program);
    command.args(["-namespace", &args.namespace, "-id", &args.id, "-address", &args.address]);
    command.arg("-socket").arg(path);
    if params.debug {
        command.arg("-debug");
    }
    command
        .arg("serve")
        .env("TTRPC_ADDRESS", &params.ttrpc_address)
        .stdin(Stdio::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = command.spawn().map_err(|e| Error::caused("cannot start the server process", e))?;
    avoid_oom_before_containerd(child.id());
    Ok(())
}

/// Under memory pressure the kernel should take a shim before it takes containerd: one above containerd's score, as
/// containerd's own shims do. Only a wish: the score may not be lowered without CAP_SYS_RESOURCE.
fn avoid_oom_before_containerd(pid: u32) {
    let containerd = std::os::unix::process::parent_id();
    let Ok(text) = fs::read_to_string(format!("/proc/{containerd}/oom_score_adj")) else { return };
    let Ok(score) = text.trim().parse::<i32>() else { return };
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), (score + 1).min(1000).to_string());
}
