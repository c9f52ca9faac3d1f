//! Hooks: programs that clients want run at points of a container's life (config.md, "POSIX-platform Hooks"). They get
//! the container's state as JSON on standard input, which is how nerdctl's network comes about.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use oci_spec::runtime::Hook;
use rustix::fs::{memfd_create, MemfdFlags};
use serde::Serialize;
use serde_json::Value;
use tracing::{debug, warn};

use super::field;
use crate::error::{Error, Kind, Result};

/// File in the bundle that says that poststop hooks are due: whoever removes it runs them.
const DUE: &str = "ovms-poststop-due";
/// How long a hook may take that names no timeout.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How much of a failed hook's output goes into the error, in bytes.
const SAID: u64 = 2048;

/// The hooks of a container.
#[derive(Clone, Debug, Default)]
pub struct Hooks {
    create: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
    version: String,
    annotations: BTreeMap<String, String>,
    bundle: PathBuf,
}

/// What a hook reads (runtime.md, "State").
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    bundle: &'a Path,
    annotations: &'a BTreeMap<String, String>,
}

impl Hooks {
    /// Reads them from a spec.
    pub(super) fn read(spec: &Value, bundle: &Path) -> Result<Self> {
        let list = |name: &str| field::<Vec<Hook>>(spec, &format!("/hooks/{name}")).map(Option::unwrap_or_default);
        let mut create = list("prestart")?;
        create.extend(list("createRuntime")?);
        Ok(Self {
            create,
            poststart: list("poststart")?,
            poststop: list("poststop")?,
            version: field(spec, "/ociVersion")?.unwrap_or_default(),
            annotations: field(spec, "/annotations")?.unwrap_or_default(),
            bundle: bundle.to_owned(),
        })
    }

    /// Runs what belongs to the creation of a container whose VMM is `pid`.
    ///
    /// # Errors
    /// When one fails; the others are not run.
    pub fn create_runtime(&self, id: &str, pid: u32) -> Result<()> {
        if !self.poststop.is_empty() {
            fs::write(self.bundle.join(DUE), "").map_err(|e| Error::caused("cannot note that hooks are due", e))?;
        }
        self.create.iter().try_for_each(|hook| self.run(hook, "createRuntime", id, "creating", Some(pid)))
    }

    /// Runs what follows the start; failures are only logged.
    pub fn poststart(&self, id: &str, pid: u32) {
        for hook in &self.poststart {
            if let Err(error) = self.run(hook, "poststart", id, "running", Some(pid)) {
                warn!(error = error.chain(), "a hook has failed");
            }
        }
    }

    /// Runs what follows the end, once for each container; failures are only logged.
    pub fn poststop(&self, id: &str) {
        if self.poststop.is_empty() || fs::remove_file(self.bundle.join(DUE)).is_err() {
            return;
        }
        for hook in &self.poststop {
            if let Err(error) = self.run(hook, "poststop", id, "stopped", None) {
                warn!(error = error.chain(), "a hook has failed");
            }
        }
    }

    fn run(&self, hook: &Hook, name: &str, id: &str, status: &str, pid: Option<u32>) -> Result<()> {
        let state =
            State { oci_version: &self.version, id, status, pid, bundle: &self.bundle, annotations: &self.annotations };
        let state = serde_json::to_vec(&state).map_err(|e| Error::caused("cannot write the state for a hook", e))?;
        let failed = |why: String| Error::new(Kind::Internal, format!("{name} hook {} {why}", hook.path().display()));
        debug!(hook = %hook.path().display(), name, "running a hook");
        let mut said = memory_file().map_err(|e| Error::caused("cannot make a file for a hook's output", e))?;
        let output = said.try_clone().map_err(|e| Error::caused("cannot share a file with a hook", e))?;
        let input = input(&state).map_err(|e| Error::caused("cannot make a file for a hook's input", e))?;
        let mut child = command(hook, input, output)
            .spawn()
            .map_err(|e| Error::caused(format!("cannot run the {name} hook {}", hook.path().display()), e))?;
        let timeout = hook.timeout().and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
        let end = Instant::now() + timeout.map_or(TIMEOUT, Duration::from_secs);
        loop {
            match child.try_wait().map_err(|e| Error::caused("cannot wait for a hook", e))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(failed(format!("has failed ({status}): {}", tail(&mut said)))),
                None if Instant::now() >= end => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(failed("has not ended in time".into()));
                }
                None => thread::sleep(Duration::from_millis(2)),
            }
        }
    }
}

fn command(hook: &Hook, input: File, output: File) -> Command {
    let mut command = Command::new(hook.path());
    if let Some((name, args)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(args);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    command.stdin(input).stdout(Stdio::null()).stderr(output);
    command
}

fn input(state: &[u8]) -> std::io::Result<File> {
    let mut file = memory_file()?;
    file.write_all(state)?;
    file.rewind()?;
    Ok(file)
}

/// A file and not a pipe: a hook need not read its input, and what it leaves running may keep its output open for ever.
fn memory_file() -> std::io::Result<File> {
    Ok(memfd_create("ovms-hook", MemfdFlags::CLOEXEC)?.into())
}

fn tail(said: &mut File) -> String {
    let mut text = Vec::new();
    let _ = said.rewind().and_then(|()| said.take(SAID).read_to_end(&mut text));
    String::from_utf8_lossy(&text).trim().replace('\n', "; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hooks(dir: &Path, name: &str, script: &str) -> Hooks {
        let spec = json!({
            "ociVersion": "1.2.0",
            "annotations": {"nerdctl/name": "web"},
            "hooks": {name: [{"path": "/bin/sh", "args": ["sh", "-c", script, "x"], "env": ["OUT=out"], "timeout": 5}]}
        });
        let mut hooks = Hooks::read(&spec, dir).unwrap();
        hooks.bundle = dir.to_owned();
        hooks
    }

    #[test]
    fn a_create_hook_reads_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let hooks = hooks(dir.path(), "createRuntime", &format!("/bin/cat >{}", out.display()));

        hooks.create_runtime("vm1", 42).unwrap();

        let state: Value = serde_json::from_slice(&fs::read(out).unwrap()).unwrap();
        let expected = json!({"ociVersion": "1.2.0", "id": "vm1", "status": "creating", "pid": 42,
            "bundle": dir.path(), "annotations": {"nerdctl/name": "web"}});
        assert_eq!(state, expected);
    }

    #[test]
    fn a_failed_create_hook_tells_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let err =
            hooks(dir.path(), "prestart", "echo no such bridge >&2; exit 3").create_runtime("vm1", 1).unwrap_err();
        assert!(err.chain().contains("exit status: 3") && err.chain().contains("no such bridge"), "{}", err.chain());
    }

    #[test]
    fn poststop_runs_once_and_only_after_a_creation() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let hooks = hooks(dir.path(), "poststop", &format!("echo ran >>{}", out.display()));
        hooks.poststop("vm1");
        assert!(!out.exists());

        hooks.create_runtime("vm1", 1).unwrap();
        hooks.poststop("vm1");
        hooks.poststop("vm1");
        assert_eq!(fs::read_to_string(out).unwrap(), "ran\n");
    }
}
