use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{mknodat, FileType, Mode, CWD};

use super::*;
use crate::error::Kind;

fn fifo(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    path
}

fn names(stdin: &Path, stdout: &Path) -> Stdio {
    Stdio { stdin: stdin.display().to_string(), stdout: stdout.display().to_string(), ..Stdio::default() }
}

#[test]
fn a_client_that_comes_after_the_end_reads_all_and_sees_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (stdin, stdout) = (fifo(dir.path(), "in"), fifo(dir.path(), "out"));
    let (mut streams, console) = Streams::open(&names(&stdin, &stdout), "default", "vm1").unwrap();
    let mut output = File::from(console.stdout.unwrap());
    output.write_all(b"last words").unwrap();
    drop(output);

    let unread = streams.end();
    let released = thread::spawn(move || unread.release());
    thread::sleep(Duration::from_millis(100));
    let mut text = String::new();
    File::open(&stdout).unwrap().read_to_string(&mut text).unwrap();

    assert_eq!(text, "last words");
    released.join().unwrap();
}

#[test]
fn release_with_nothing_unread_does_not_wait() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "out");
    let stdio = Stdio { stdout: stdout.display().to_string(), ..Stdio::default() };
    let (mut streams, console) = Streams::open(&stdio, "default", "vm1").unwrap();
    drop(console);
    let began = Instant::now();
    streams.end().release();
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[test]
fn the_guest_reads_on_when_clients_come_and_go_until_input_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let (stdin, stdout) = (fifo(dir.path(), "in"), fifo(dir.path(), "out"));
    let (mut streams, console) = Streams::open(&names(&stdin, &stdout), "default", "vm1").unwrap();
    let mut input = File::from(console.stdin.unwrap());
    for word in [b"one", b"two"] {
        let mut client = OpenOptions::new().write(true).open(&stdin).unwrap();
        client.write_all(word).unwrap();
        drop(client);
        let mut read = [0; 3];
        input.read_exact(&mut read).unwrap();
        assert_eq!(&read, word);
    }
    streams.close_input();
    assert_eq!(input.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn file_output_is_appended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/vm.log");
    let stdio = Stdio { stdout: format!("file://{}", path.display()), ..Stdio::default() };
    for word in ["one ", "two"] {
        let (mut streams, console) = Streams::open(&stdio, "default", "vm1").unwrap();
        File::from(console.stdout.unwrap()).write_all(word.as_bytes()).unwrap();
        streams.end().release();
    }
    assert_eq!(fs::read_to_string(path).unwrap(), "one two");
}

/// As the VMM, which may write files of a limited size alone.
#[test]
fn file_output_goes_beyond_the_size_of_files_that_the_machine_may_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.log");
    // It is longer than that already.
    fs::write(&path, vec![b'-'; 100 << 10]).unwrap();
    let stdio = Stdio { stdout: format!("file://{}", path.display()), ..Stdio::default() };
    let (mut streams, console) = Streams::open(&stdio, "default", "vm1").unwrap();
    let script = "trap '' XFSZ; ulimit -f 1; head -c 300000 /dev/zero | tr '\\0' x; echo end";
    let status = std::process::Command::new("/bin/sh").args(["-c", script]).stdout(console.stdout.unwrap()).status();
    assert!(status.unwrap().success());
    streams.end().release();
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.len(), (100 << 10) + 300_000 + 4);
    assert!(text.ends_with("xend\n"));
}

#[test]
fn a_logger_gets_the_output_its_arguments_and_only_its_two_variables() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("logger");
    let script =
        "#!/bin/sh\n/usr/bin/env >$2.env\necho \"$1\" >$2.args\nexec 5>&-\n/bin/cat <&3 >$2\n/bin/cat <&4 >$2.err\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let log = dir.path().join("log");
    let stdio = Stdio {
        stdout: format!("binary://{}?KEY={}", program.display(), log.display()),
        stderr: format!("binary://{}?KEY={}", program.display(), log.display()),
        ..Stdio::default()
    };

    let (mut streams, console) = Streams::open(&stdio, "default", "vm1").unwrap();
    File::from(console.stdout.unwrap()).write_all(b"all of it").unwrap();
    streams.end().release();
    streams.take_logger().unwrap().finish();

    assert_eq!(fs::read_to_string(&log).unwrap(), "all of it");
    assert_eq!(fs::read_to_string(log.with_extension("args")).unwrap(), "KEY\n");
    assert_eq!(fs::read_to_string(log.with_extension("err")).unwrap(), "");
    let env = fs::read_to_string(log.with_extension("env")).unwrap();
    assert!(env.contains("CONTAINER_ID=vm1") && env.contains("CONTAINER_NAMESPACE=default"), "{env}");
    assert!(!env.contains("CARGO"), "{env}");
}

#[test]
fn open_a_regular_file_as_fifo_returns_invalid() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "").unwrap();
    let stdio = Stdio { stdout: path.display().to_string(), ..Stdio::default() };
    assert_eq!(Streams::open(&stdio, "default", "vm1").unwrap_err().kind(), Kind::Invalid);
}

#[test]
fn open_with_a_terminal_does_not_look_for_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "out");
    let stderr = dir.path().join("err").display().to_string();
    let mut stdio = Stdio { stdout: stdout.display().to_string(), stderr, terminal: true, ..Stdio::default() };
    Streams::open(&stdio, "default", "vm1").unwrap();
    stdio.terminal = false;
    let err = Streams::open(&stdio, "default", "vm1").unwrap_err();
    assert!(err.chain().contains("/err"), "{}", err.chain());
}
