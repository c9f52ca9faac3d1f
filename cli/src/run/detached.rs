//! `ovm run -d`: the machine stays with a background process, the keeper.
//!
//! ```text
//!  ovm run -d ──spawns itself with --keeper──> keeper: a session of its own, no terminal, /
//!     │  unpacks the image, shows progress        │ makes and starts the machine as `ovm run` does
//!     │<──one line: started | what went wrong─────┤ console ─> <state>/run/<id>/console.log
//!     └ prints the id, ends                       └ stays until the machine has ended
//! ```

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::{self, JoinHandle};

use nix::unistd::setsid;
use serde::{Deserialize, Serialize};

use crate::error::CliError;

/// The hidden flag.
pub const FLAG: &str = "--keeper";
/// The longest a log becomes before it takes the place of the one before it: what a guest writes must not fill the disk.
const MAX_LOG: u64 = 8 << 20;
/// Stack of the thread that copies the console.
const STACK: usize = 128 << 10;

/// What the keeper tells whoever spawned it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Started,
    Failed { code: u8, message: String },
}

/// Starts a keeper with this process's own arguments and the machine's name, and waits until the machine runs.
pub fn launch(id: &str, layout: &Path) -> Result<ExitCode, CliError> {
    let program = std::env::current_exe().map_err(CliError::io)?;
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1)).args([FLAG, id]).arg("--keeper-layout").arg(layout);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut keeper = command.spawn().map_err(CliError::io)?;
    let mut line = String::new();
    if let Some(said) = keeper.stdout.take() {
        BufReader::new(said).read_line(&mut line).map_err(CliError::io)?;
    }
    match serde_json::from_str(&line) {
        Ok(Word::Started) => {
            crate::text::print(&format!("{id}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        Ok(Word::Failed { code, message }) => Err(CliError::other_process(code, message)),
        Err(_) => {
            let status = keeper.wait().map_err(CliError::io)?;
            Err(CliError::io(io::Error::other(format!("the process that was to keep the machine ended ({status})"))))
        }
    }
}

/// Becomes a keeper: a session of its own, and no directory that could not be unmounted.
pub fn settle() -> Result<(), CliError> {
    setsid().map_err(|errno| CliError::io(io::Error::from(errno)))?;
    std::env::set_current_dir("/").map_err(CliError::io)
}

/// Tells whoever spawned us that the machine runs, or why not. Who has gone meanwhile does not matter.
pub fn tell(started: Result<(), &CliError>) {
    let word = match started {
        Ok(()) => Word::Started,
        Err(err) => Word::Failed { code: err.number(), message: err.chain() },
    };
    let mut line = serde_json::to_vec(&word).unwrap_or_default();
    line.push(b'\n');
    let mut out = io::stdout();
    let _ = out.write_all(&line).and_then(|()| out.flush());
}

/// Copies a console into a log until its end. A log that cannot be written is given up; the guest goes on.
pub fn log(mut console: File, path: PathBuf) -> io::Result<JoinHandle<()>> {
    let mut log = Log::open(path)?;
    thread::Builder::new().name("console-log".into()).stack_size(STACK).spawn(move || {
        let mut buffer = [0; 16 << 10];
        let mut wanted = true;
        loop {
            match console.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => wanted = wanted && log.write(buffer.get(..length).unwrap_or_default()).is_ok(),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => (),
                Err(_) => return,
            }
        }
    })
}

struct Log {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Log {
    fn open(path: PathBuf) -> io::Result<Self> {
        Ok(Self { file: File::create(&path)?, path, size: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size >= MAX_LOG {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            fs::rename(&self.path, old)?;
            self.file = File::create(&self.path)?;
            self.size = 0;
        }
        self.file.write_all(bytes)?;
        self.size = self.size.saturating_add(bytes.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_keeps_the_last_bytes_and_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Log::open(path.clone()).unwrap();
        let block = vec![b'x'; 1 << 20];
        for _ in 0..20 {
            log.write(&block).unwrap();
        }
        log.write(b"end").unwrap();
        assert!(fs::read(&path).unwrap().ends_with(b"end"));
        let sizes = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
        assert!(sizes.sum::<u64>() <= 2 * (MAX_LOG + (1 << 20)));
    }
}
