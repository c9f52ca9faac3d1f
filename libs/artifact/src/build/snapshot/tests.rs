use std::fs;

use super::*;
use crate::build::{Options, Recipe};
use crate::layer::Limits;
use crate::layout::{DirSink, Loaded, Quiet, Store};
use crate::manifest::Kernel;

struct Bench {
    dir: tempfile::TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let bench = Self { dir, store };
        let mut kernel = vec![0; 4096];
        kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        bench.file("kernel", &kernel);
        bench.file("base.raw", &[7; 1000]);
        bench
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn base(&self, sink: Box<dyn Sink>) -> Built {
        let path = self.dir.path().join("kernel");
        let mut recipe = Recipe {
            manifest: Manifest::new("demo/debian", "13"),
            kernel: Some(path.clone()),
            initrd: None,
            disks: Vec::new(),
            ram_snapshot: None,
        };
        recipe.manifest.kernel = Some(Kernel { reference: Ref::File(path), args: None, extra: Map::new() });
        recipe.push_disk(self.dir.path().join("base.raw"), DiskFormat::Raw);
        recipe.build(sink, Options { names: vec![name("base:1")], ..Options::default() }, &Quiet).unwrap()
    }

    fn snapshot(&self, ram: &str, parents: Vec<Digest>, tag: &str) -> Snapshot {
        Snapshot {
            ram: self.file(ram, ram.as_bytes()),
            parents,
            disk: Some(self.file("diff", format!("what {ram} wrote").as_bytes())),
            vcpus: 2,
            memory: 64 << 20,
            preload_hint: true,
            mlock_required: false,
            names: vec![name(tag)],
            epoch: Some(1_000_000_000),
        }
    }

    /// Takes a snapshot image of `base` in the store.
    fn take(&self, base: &str, snapshot: Snapshot) -> Result<Built, BuildError> {
        let image = self.store.find(base).unwrap();
        let layout = self.store.layout().unwrap();
        snapshot.build(&layout, &image, &Limits::default(), Box::new(self.store.writer().unwrap()), &Quiet)
    }

    fn load(&self, tag: &str) -> Loaded {
        let tag = name(tag).full;
        self.store.layout().unwrap().verify(Some(&tag), &Quiet).unwrap()
    }
}

fn name(text: &str) -> ImageName {
    ImageName::parse(text).unwrap()
}

#[test]
fn snapshot_shares_the_bases_chain_and_names_it_as_its_subject() {
    let bench = Bench::new();
    let base = bench.base(Box::new(bench.store.writer().unwrap()));

    bench.take("base:1", bench.snapshot("ram 1", Vec::new(), "snap:1")).unwrap();

    let (before, after) = (bench.load("base:1"), bench.load("snap:1"));
    assert_eq!(after.parts.layers.len(), before.parts.layers.len() + 2);
    for (old, new) in before.parts.layers.iter().zip(&after.parts.layers) {
        assert_eq!((old.diff_id, &old.blob), (new.diff_id, &new.blob));
    }
    assert_eq!(after.descriptor, after.parts.layers.last().map(|layer| layer.blob.digest));
    let formats: Vec<_> = after.resolved.disks.iter().map(|disk| disk.format).collect();
    assert_eq!(formats, [DiskFormat::Raw, DiskFormat::Qcow2]);
    assert_eq!(after.resolved.ram_snapshot.unwrap().digest, Digest::of(b"ram 1"));
    let ram = after.resolved.manifest.ram_snapshot.clone().unwrap();
    assert_eq!((ram.preload_hint, ram.mlock_required), (true, false));
    let manifest = &after.resolved.manifest;
    assert_eq!((manifest.vcpus(), manifest.memory_bytes()), (Some(2), Some(64 << 20)));
    assert_eq!(manifest.metadata.as_ref().unwrap().created.as_deref(), Some("2001-09-09T01:46:40Z"));
    let layout = bench.store.layout().unwrap();
    let documents = layout.documents(&layout.select(Some(&name("snap:1").full)).unwrap()).unwrap();
    let subject = documents.manifest.subject().clone().unwrap();
    assert_eq!(Digest::try_from(subject.digest()).unwrap(), base.image.digest);
}

#[test]
fn snapshot_of_a_clone_keeps_the_parents_ram_and_a_full_one_drops_it() {
    let bench = Bench::new();
    bench.base(Box::new(bench.store.writer().unwrap()));
    bench.take("base:1", bench.snapshot("ram 1", Vec::new(), "snap:1")).unwrap();

    bench.take("snap:1", bench.snapshot("ram 2", vec![Digest::of(b"ram 1")], "snap:2")).unwrap();
    bench.take("snap:1", bench.snapshot("ram 3", Vec::new(), "snap:3")).unwrap();

    let rams = |tag| bench.load(tag).parts.ram_snapshots.iter().map(|blob| blob.digest).collect::<Vec<_>>();
    let [one, two, three] = [b"ram 1", b"ram 2", b"ram 3"].map(|text| Digest::of(text));
    assert_eq!((rams("snap:2"), rams("snap:3")), (vec![one, two], vec![three]));
    let second = bench.load("snap:2").resolved;
    assert_eq!((second.disks.len(), second.ram_snapshot.unwrap().digest), (3, two));
}

#[test]
fn snapshot_whose_parent_the_base_lacks_returns_the_way_out() {
    let bench = Bench::new();
    bench.base(Box::new(bench.store.writer().unwrap()));

    let error = bench.take("base:1", bench.snapshot("ram", vec![Digest::of(b"?")], "snap:1")).unwrap_err();

    assert!(matches!(&error, BuildError::NoParent { .. }) && error.to_string().contains("--full"), "{error}");
    assert!(bench.store.find("snap:1").is_err());
}

#[test]
fn snapshot_of_a_base_in_another_layout_copies_what_it_needs() {
    let bench = Bench::new();
    let dir = bench.dir.path().join("layout");
    bench.base(Box::new(DirSink::create(&dir).unwrap()));
    let layout = Layout::open(&dir).unwrap();
    let image = layout.select(None).unwrap();

    let snapshot = bench.snapshot("ram 1", Vec::new(), "snap:1");
    snapshot.build(&layout, &image, &Limits::default(), Box::new(bench.store.writer().unwrap()), &Quiet).unwrap();

    assert_eq!(bench.load("snap:1").resolved.disks.len(), 2);
}
