//! The tops of a machine's snapshot, of which there is more than one once a disk was frozen under its machine. The bundle
//! record names them; the engine that runs the machine adds to it.
//!
//! ```text
//!  stopped:  [frozen 1][frozen 2]...[top]    all of them, under the top's shared lock
//!  running:  [frozen 1][frozen 2]...[top] ──FreezeDisk──> [frozen 1][frozen 2]...[frozen n] [new top]
//!                                                          what is read; never written again
//! ```

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use ovms_bundle::{holder, layer as files, Bundle, Disk, Record, TopPaths};
use ovms_disk::{LayerMap, Stack, StackFiles, State, Top, TopFiles};
use ovms_proto::machine::{Client, RequestError, ToMachine};
use rustix::fs::FlockOperation;
use tempfile::TempDir;

use super::resolve::BUNDLE;
use super::ReadyLayer;
use crate::daemon::Daemon;
use crate::error::{Context, Error, Kind, Result};
use crate::layout;

/// How often a disk that changes hands is looked at again.
const TRIES: u32 = 10;
/// How long it is left alone in between: a machine that ends gives up its socket before its lock.
const PAUSE: Duration = Duration::from_millis(200);

/// A machine's disk whose tops nobody writes.
#[derive(Debug)]
pub struct Still {
    /// The machine.
    pub record: Record,
    /// Its disk; none for a machine without one.
    pub stack: Option<Stack>,
}

/// Opens the disk of a machine as it is now: all of it where no machine runs, else what its engine freezes for us.
pub fn open_still(bundle: &Path) -> Result<Still> {
    let failed = || "the machine's disk cannot be opened";
    let mut last = None;
    for _ in 0..TRIES {
        match Bundle::open(bundle, "a commit of its disk", true) {
            Ok(Bundle { record, disk, .. }) => {
                let stack = disk.map(|disk| disk.into_stack()).transpose().context(failed)?;
                return Ok(Still { record, stack });
            }
            Err(err @ ovms_bundle::Error::InUse { .. }) => last = Some(err),
            Err(err) => return Err(err).context(failed),
        }
        if let Some(still) = freeze(bundle)? {
            return Ok(still);
        }
        std::thread::sleep(PAUSE);
    }
    let message = "the disk is in use by something that cannot be asked to freeze it: stop the machine first";
    Err(match last {
        Some(err) => Error::precondition(message).because(err),
        None => Error::precondition(message),
    })
}

/// Asks the engine of the machine that runs to freeze the disk; `None` if the machine ends meanwhile.
fn freeze(bundle: &Path) -> Result<Option<Still>> {
    let failed = || "the running machine's disk cannot be read";
    let before = Record::load(bundle).context(failed)?;
    let Some(disk) = before.disk else { return Ok(None) };
    let Some(top) = disk.top else { return Ok(None) };
    // Whoever froze one has held it before.
    let held = std::iter::once(&top).chain(disk.frozen.iter().rev());
    let Some(socket) = held.filter_map(|top| holder(&top.data)?.socket).next() else { return Ok(None) };
    let asked = Client::connect(&socket).and_then(|client| client.request(&ToMachine::FreezeDisk, &mut |_| ()));
    match asked {
        Ok(_) => {}
        Err(RequestError::Connect { .. } | RequestError::Closed) => return Ok(None),
        Err(err) => {
            return Err(err).context_kind(Kind::Precondition, || "the running machine's disk cannot be frozen");
        }
    }
    let record = Record::load(bundle).context(failed)?;
    let Some(disk) = &record.disk else { return Ok(None) };
    // The engine lists a top before it is frozen, so with another freeze under way the last of the list may still be
    // written. The one that was the top when we asked is frozen by now, and with it everything before it.
    let Some(last) = disk.frozen.iter().position(|frozen| frozen.data == top.data) else { return Ok(None) };
    let frozen = disk.frozen.iter().take(last + 1).map(open_top).collect::<Result<Vec<_>>>()?;
    let stack = open_stack(disk, frozen).context(failed)?;
    Ok(Some(Still { record, stack: Some(stack) }))
}

/// The tops of a snapshot that no machine has, oldest first; none if no machine was ever made in it.
#[derive(Debug)]
pub struct Tops {
    disk: Disk,
    paths: Vec<TopPaths>,
}

impl Tops {
    /// Looks into a snapshot's directory.
    pub fn find(dir: &Path) -> Result<Option<Self>> {
        let bundle = dir.join(BUNDLE);
        if !bundle.exists() {
            return Ok(None);
        }
        let record = Record::load(&bundle).context(|| "the machine's record cannot be read")?;
        Ok(record.disk.map(|disk| {
            let paths = disk.frozen.iter().chain(&disk.top).cloned().collect();
            Self { disk, paths }
        }))
    }

    /// Fails if a machine runs on them.
    pub fn check_unused(&self) -> Result<()> {
        for TopPaths { data, .. } in &self.paths {
            let file = File::open(data).context(|| format!("cannot open {}", data.display()))?;
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
                Error::precondition("the machine's disk is in use: stop the machine before its snapshot is committed")
            })?;
        }
        Ok(())
    }

    /// The only one, where there is only one.
    pub fn only(&self) -> Option<&TopPaths> {
        match self.paths.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }

    /// All of them on the disk that they belong to, for reading.
    pub fn open(&self) -> Result<Stack> {
        let files = self.paths.iter().map(open_top).collect::<Result<Vec<_>>>()?;
        open_stack(&self.disk, files)
    }
}

/// A directory in the making for the tops of a snapshot, with the one that lies below the machine's first: a disk that goes
/// on where another machine's was written out.
#[derive(Debug)]
pub struct Base {
    /// The directory, synced but for itself.
    pub made: TempDir,
    /// The disk's size in bytes.
    pub virtual_size: u64,
}

impl Base {
    /// That of a layer, whose data file it shares.
    pub fn of_layer(daemon: &Daemon, layer: &ReadyLayer) -> Result<Self> {
        let failed = || "the snapshot's own disk layer cannot be used";
        let made = new_dir(daemon)?;
        let map = files::load_map(&layer.dir).context(failed)?;
        std::fs::hard_link(files::data_path(&layer.dir), base_paths(made.path()).data).context(failed)?;
        Self::finish(made, &map)
    }

    /// Makes the top out of the layer that a worker has left in `made`.
    pub fn of_unpacked(made: TempDir) -> Result<Self> {
        let failed = || "the unpacked disk cannot be used";
        let map = files::load_map(made.path()).context(failed)?;
        std::fs::remove_file(files::map_path(made.path())).context(failed)?;
        std::fs::rename(files::data_path(made.path()), base_paths(made.path()).data).context(failed)?;
        Self::finish(made, &map)
    }

    fn finish(made: TempDir, map: &LayerMap) -> Result<Self> {
        let failed = || "the disk cannot be laid below the machine's";
        let paths = base_paths(made.path());
        let data = File::options().read(true).write(true).open(paths.data).context(failed)?;
        let file = File::options().read(true).write(true).create_new(true).open(paths.map).context(failed)?;
        Top::create_from_layer(map, &data, &file).context_kind(Kind::Invalid, failed)?;
        data.sync_all().and_then(|()| file.sync_all()).context(failed)?;
        Ok(Self { made, virtual_size: map.virtual_size() })
    }
}

/// A directory in the making for tops.
pub fn new_dir(daemon: &Daemon) -> Result<TempDir> {
    let made = tempfile::Builder::new().prefix("top-").tempdir_in(daemon.layout.tmp());
    made.context(|| "cannot make a directory for the machine's disk")
}

/// The files of [`Base`] in the directory of the tops.
pub fn base_paths(tops: &Path) -> TopPaths {
    TopPaths { data: tops.join("base.data"), map: tops.join("base.map") }
}

/// Whether a machine's disk is as it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A machine holds it.
    InUse,
    /// No machine has written to it.
    Untouched,
    /// A machine has.
    Written,
}

/// Looks at the disk of a record in a snapshot's directory and calls `then` while no machine can take it.
pub fn look(record: &Record, dir: &Path, then: impl FnOnce(Seen) -> Result<()>) -> Result<()> {
    let Some(disk) = &record.disk else { return then(Seen::Untouched) };
    let mut seen = Seen::Untouched;
    let mut locked = Vec::new();
    let base = base_paths(&layout::top_dir(dir)).data;
    for paths in disk.frozen.iter().chain(&disk.top).filter(|paths| paths.data != base) {
        let TopFiles { data, map } = open_top(paths)?;
        let lock = data.try_clone().context(|| "a descriptor cannot be copied")?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return then(Seen::InUse);
        }
        locked.push(lock);
        let failed = || "the machine's disk cannot be read";
        let map = Top::open(data, map).and_then(|top| top.to_layer_map()).context(failed)?;
        if map.extents().any(|extent| extent.state != State::Absent) {
            seen = Seen::Written;
        }
    }
    then(seen)
}

fn open_top(paths: &TopPaths) -> Result<TopFiles> {
    let open = |path: &Path| File::open(path).context(|| format!("cannot open {}", path.display()));
    Ok(TopFiles { data: open(&paths.data)?, map: open(&paths.map)? })
}

fn open_stack(disk: &Disk, frozen: Vec<TopFiles>) -> Result<Stack> {
    let open = |path: &std::path::PathBuf| File::open(path).context(|| format!("cannot open {}", path.display()));
    let layers = disk.layers.iter().map(open).collect::<Result<Vec<_>>>()?;
    let files = StackFiles { table: open(&disk.table)?, layers, frozen, top: None };
    Stack::open(files, true).context(|| "the machine's disk cannot be opened")
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::thread::{self, JoinHandle};

    use ovms_bundle::{create_top, Holder, Manifest, RECORD_VERSION};
    use ovms_disk::qcow2::Plan;
    use ovms_disk::Table;
    use ovms_proto::machine::{listen, read_line, write_line, FromMachine, SOCKET};

    use super::*;

    const SIZE: u64 = 1 << 20;

    /// A machine's record in a directory, with a fresh top on an empty disk.
    fn record(dir: &Path) -> PathBuf {
        let file = |name: &str| File::options().read(true).write(true).create_new(true).open(dir.join(name)).unwrap();
        Table::empty(SIZE).unwrap().write_to(&file("table")).unwrap();
        let top = TopPaths { data: "data".into(), map: "map".into() };
        create_top(&TopPaths { data: dir.join("data"), map: dir.join("map") }, SIZE).unwrap();
        let disk = Disk {
            virtual_size: SIZE,
            table: "table".into(),
            layers: Vec::new(),
            frozen: Vec::new(),
            top: Some(top),
            read_only: false,
        };
        let record = Record {
            version: RECORD_VERSION,
            image: None,
            manifest: Manifest::new("test", "1"),
            kernel: None,
            initrd: None,
            disk: Some(disk),
            ram: None,
        };
        record.save(&dir.join(BUNDLE)).unwrap();
        dir.join(BUNDLE)
    }

    /// Opens the disk as a machine does, and freezes it whenever it is asked, as an engine does: the record first.
    fn run_machine(dir: &Path, requests: usize) -> (Arc<Stack>, JoinHandle<()>) {
        let socket = dir.join(SOCKET);
        let by = Holder { text: "machine a/b".into(), socket: Some(socket.clone()) };
        let disk = Bundle::open(&dir.join(BUNDLE), by, false).unwrap().disk.unwrap();
        let stack = Arc::new(disk.into_stack().unwrap());
        let (listener, dir, frozen) = (listen(&socket).unwrap(), dir.to_owned(), Arc::clone(&stack));
        let engine = thread::spawn(move || {
            for number in 0..requests {
                let (mut stream, _) = listener.accept().unwrap();
                let asked: Option<ToMachine> = read_line(&mut BufReader::new(&stream)).unwrap();
                assert_eq!(asked, Some(ToMachine::FreezeDisk));
                let paths =
                    TopPaths { data: dir.join(format!("data.{number}")), map: dir.join(format!("map.{number}")) };
                create_top(&paths, SIZE).unwrap();
                let open = |path| File::options().read(true).write(true).open(path).unwrap();
                let files = TopFiles { data: open(&paths.data), map: open(&paths.map) };
                rustix::fs::flock(&files.data, FlockOperation::NonBlockingLockExclusive).unwrap();
                let mut record = Record::load(&dir.join(BUNDLE)).unwrap();
                let disk = record.disk.as_mut().unwrap();
                disk.frozen.extend(disk.top.replace(paths));
                record.save(&dir.join(BUNDLE)).unwrap();
                frozen.freeze(files).unwrap();
                write_line(&mut stream, &FromMachine::Done { stood_micros: 0 }).unwrap();
            }
        });
        (stack, engine)
    }

    fn sector(stack: &Stack, at: u64) -> u8 {
        let mut bytes = [0; 512];
        stack.read_at(at, &mut bytes).unwrap();
        bytes[511]
    }

    #[test]
    fn the_disk_of_a_running_machine_is_frozen_and_read_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = record(dir.path());
        // The lock of the new top is held by a descriptor of the stack; the holder is that of the first.
        let (machine, engine) = run_machine(dir.path(), 1);
        machine.write_at(0, &[1; 4096]).unwrap();

        let still = open_still(&bundle).unwrap();

        machine.write_at(0, &[2; 4096]).unwrap();
        let stack = still.stack.unwrap();
        assert_eq!((sector(&stack, 0), sector(&machine, 0)), (1, 2));
        assert_eq!(Plan::diff(&stack).unwrap().data_bytes(), 64 << 10);
        engine.join().unwrap();
    }

    #[test]
    fn the_disk_of_a_machine_that_ended_has_all_of_its_tops() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = record(dir.path());
        let (machine, engine) = run_machine(dir.path(), 1);
        machine.write_at(0, &[1; 8192]).unwrap();
        drop(open_still(&bundle).unwrap());
        engine.join().unwrap();
        let tops = Tops::find(dir.path()).unwrap().unwrap();
        assert!(tops.only().is_none() && tops.check_unused().unwrap_err().chain().contains("in use"));
        machine.write_at(0, &[2; 4096]).unwrap();
        machine.flush().unwrap();
        drop(machine);

        let stack = open_still(&bundle).unwrap().stack.unwrap();

        assert_eq!((sector(&stack, 0), sector(&stack, 4096)), (2, 1));
        drop(stack);
        tops.check_unused().unwrap();
        assert_eq!(sector(&tops.open().unwrap(), 0), 2);
    }

    #[test]
    fn open_still_of_a_disk_that_nobody_can_freeze_returns_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = record(dir.path());
        let _held = Bundle::open(&bundle, "a tool", false).unwrap();

        let err = open_still(&bundle).unwrap_err();

        assert_eq!(err.kind(), Kind::Precondition);
        assert!(err.chain().contains("in use by a tool"), "{}", err.chain());
    }
}
