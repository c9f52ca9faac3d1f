//! Asks the snapshotter for the machine behind a rootfs mount.

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::Path;

use ovms_proto::bundle::{read_line, write_line, FromSnapshotter, RefusalKind, ToSnapshotter};

use crate::error::{Error, Kind, Result};
use crate::instance::{Image, Rootfs};

/// Waits for as long as the snapshotter has something to do; containerd's own deadline ends it.
///
/// # Errors
/// [`Kind::Unavailable`] if the snapshotter does not answer, else what it says.
pub fn resolve(socket: &Path, rootfs: &Rootfs, own_args: &[String], progress: &dyn Fn(&str)) -> Result<Image> {
    let down = |e| {
        let message = format!(
            "the ovms snapshotter does not answer on {}: start it (`systemctl start ovms-bundle.socket`), or set \
             paths.bundle_socket in ovms.toml to where it listens",
            socket.display()
        );
        Error::caused(message, e).of_kind(Kind::Unavailable)
    };
    let mut stream = UnixStream::connect(socket).map_err(down)?;
    let request = ToSnapshotter::Resolve {
        namespace: rootfs.namespace.into(),
        container: rootfs.id.into(),
        source: rootfs.source.to_owned(),
        checkpoint: rootfs.checkpoint.map(Path::to_owned),
    };
    write_line(&mut stream, &request).map_err(down)?;
    let mut answers = BufReader::new(stream);
    loop {
        match read_line(&mut answers).map_err(down)? {
            Some(FromSnapshotter::Progress(step)) => progress(&step),
            Some(FromSnapshotter::Resolved { bundle, args }) => {
                return Ok(Image { record: bundle, args: args.unwrap_or_else(|| own_args.to_vec()) });
            }
            Some(FromSnapshotter::Refused { kind, message }) => return Err(Error::new(kind_of(kind), message)),
            None => {
                return Err(Error::new(
                    Kind::Unavailable,
                    "the ovms snapshotter went away while it prepared the image: see its log",
                ));
            }
        }
    }
}

fn kind_of(kind: RefusalKind) -> Kind {
    match kind {
        RefusalKind::NotFound => Kind::NotFound,
        RefusalKind::Invalid => Kind::Invalid,
        RefusalKind::Precondition => Kind::Precondition,
        RefusalKind::Internal => Kind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::os::unix::net::UnixListener;
    use std::thread;

    fn snapshotter(dir: &Path, answers: Vec<FromSnapshotter>) -> std::path::PathBuf {
        let path = dir.join("s");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let asked: ToSnapshotter = read_line(&mut reader).unwrap().unwrap();
            assert_eq!(
                asked,
                ToSnapshotter::Resolve {
                    namespace: "default".into(),
                    container: "vm1".into(),
                    source: "/s/7".into(),
                    checkpoint: Some("/run/ctrd-checkpoint1".into())
                }
            );
            for answer in answers {
                write_line(&mut stream, &answer).unwrap();
            }
        });
        path
    }

    fn ask(socket: &Path, progress: &dyn Fn(&str)) -> Result<Image> {
        let checkpoint = Some(Path::new("/run/ctrd-checkpoint1"));
        let rootfs = Rootfs { namespace: "default", id: "vm1", source: Path::new("/s/7"), checkpoint };
        resolve(socket, &rootfs, &["/ovm/boot".into()], progress)
    }

    #[test]
    fn resolve_tells_progress_and_gives_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let socket = snapshotter(
            dir.path(),
            vec![
                FromSnapshotter::Progress("copying the kernel".into()),
                FromSnapshotter::Resolved { bundle: "/s/7/bundle.json".into(), args: None },
            ],
        );
        let said = RefCell::new(Vec::new());
        let image = ask(&socket, &|step| said.borrow_mut().push(step.to_owned())).unwrap();
        assert_eq!(image, Image { record: "/s/7/bundle.json".into(), args: vec!["/ovm/boot".into()] });
        assert_eq!(*said.borrow(), ["copying the kernel"]);
    }

    #[test]
    fn resolve_refused_returns_the_snapshotters_sentence_and_kind() {
        let dir = tempfile::tempdir().unwrap();
        let refused = FromSnapshotter::Refused { kind: RefusalKind::Invalid, message: "kernel: no such blob".into() };
        let err = ask(&snapshotter(dir.path(), vec![refused]), &|_| ()).unwrap_err();
        assert_eq!((err.kind(), err.chain().as_str()), (Kind::Invalid, "kernel: no such blob"));
    }

    #[test]
    fn resolve_without_a_snapshotter_returns_unavailable() {
        let dir = tempfile::tempdir().unwrap();
        let err = ask(&dir.path().join("none"), &|_| ()).unwrap_err();
        assert_eq!(err.kind(), Kind::Unavailable);
        assert!(err.chain().contains("ovms-bundle.socket"), "{}", err.chain());
        let err = ask(&snapshotter(dir.path(), vec![]), &|_| ()).unwrap_err();
        assert_eq!(err.kind(), Kind::Unavailable);
    }
}
