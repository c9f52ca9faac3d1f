//! RAM snapshots through the real worker. The worker is the running program started again, so this one has a `main` of its
//! own: it becomes the worker, or runs the cases below.

#![allow(missing_docs)]

use std::{
    fs::{self, File},
    os::unix::fs::{MetadataExt, PermissionsExt},
    panic,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use ovms_artifact::{
    build::{Options as BuildOptions, Recipe},
    digest::Digest,
    layout::{DirSink, Layout, Quiet, Sink, TarSink},
    manifest::{Kernel, Manifest, RamCompression, RamSnapshot, Ref},
};
use ovms_bundle::{
    ram::{self, RamOptions},
    unpack::{Cache, Options, Step},
    worker::{intercept, Launcher, Limits, Progress, RamBlob, RamJob},
    Error, Ram,
};
use ovms_state::{Fingerprint, Section, SnapshotWriter, StateFile, CHUNK};

const MIB: usize = 1 << 20;
/// The argument that makes this program one that unpacks and is killed meanwhile.
const VICTIM: &str = "victim";

type Case = (&'static str, fn(&Path));

fn main() -> ExitCode {
    if let Some(code) = intercept() {
        return code;
    }
    let args: Vec<_> = std::env::args().collect();
    if let [_, role, root, blob] = args.as_slice() {
        if role == VICTIM {
            return victim(Path::new(root), Path::new(blob));
        }
    }
    let cases: &[Case] = &[
        ("a_whole_snapshot_is_unpacked", whole),
        ("a_chain_is_collected_by_its_heads_and_unpacked", chain_of_diffs),
        ("worker_threads_run_without_privileges", without_privileges),
        ("hostile_blobs_are_refused_and_leave_nothing", hostile),
        ("two_at_once_make_it_once", two_at_once),
        ("what_a_killed_maker_left_is_replaced", killed),
        ("giving_up_leaves_nothing", giving_up),
        ("a_killed_worker_is_an_error_that_leaves_nothing", killed_worker),
        ("layout_with_ram_gives_a_record_with_ram", layout_with_ram),
        ("layout_without_the_blob_names_it", layout_without),
    ];
    let wanted = args.get(1).filter(|a| !a.starts_with('-'));
    let mut failed = 0;
    for (name, case) in cases.iter().filter(|(name, _)| wanted.is_none_or(|w| name.contains(w.as_str()))) {
        let dir = tempfile::tempdir().unwrap();
        let result = panic::catch_unwind(|| case(dir.path()));
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
        failed += u32::from(result.is_err());
    }
    ExitCode::from(u8::from(failed > 0))
}

/// Pages of noise, of one value and of zeros.
fn memory(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut data = vec![0; bytes];
    for (i, page) in data.chunks_mut(4096).enumerate() {
        match i % 7 {
            0..=2 => {}
            3..=4 => page.fill(i as u8 | 1),
            _ => page.iter_mut().for_each(|b| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *b = (state >> 41) as u8;
            }),
        }
    }
    data
}

/// Writes a blob as `<dir>/<hex>` and returns its digest.
fn blob(dir: &Path, data: &[u8], parent: Option<(Digest, &[u8])>) -> Digest {
    let path = dir.join("new-blob");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    let writer = SnapshotWriter::create(file, data.len() as u64, parent.map(|(d, _)| d.to_string())).unwrap();
    for (i, chunk) in data.chunks(CHUNK).enumerate() {
        match parent {
            Some((_, old)) if old[i * CHUNK..][..chunk.len()] == *chunk => writer.same_as_parent(i as u64).unwrap(),
            _ => {
                writer.put(i as u64, chunk).unwrap();
            }
        }
    }
    let section = Section { kind: "serial".into(), version: 1, payload: b"state".to_vec() };
    writer.finish(1, Fingerprint::default(), &[section]).unwrap();
    let digest = Digest::of(&fs::read(&path).unwrap());
    fs::rename(&path, dir.join(digest.hex())).unwrap();
    digest
}

fn opened(dir: &Path, digest: Digest) -> RamBlob {
    let file = File::open(dir.join(digest.hex())).unwrap();
    RamBlob { digest, size: file.metadata().unwrap().len(), file, verified: false }
}

fn options(threads: usize) -> RamOptions {
    RamOptions { launcher: Launcher::new(), max_memory: 1 << 30, threads }
}

fn root(dir: &Path) -> PathBuf {
    let root = dir.join("ram");
    fs::create_dir(&root).unwrap();
    root
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

fn unpack(root: &Path, blobs: Vec<RamBlob>, threads: usize) -> Ram {
    ram::unpack(root, blobs, &options(threads), &mut |_| true).unwrap_or_else(|e| panic!("{}", told(&e)))
}

fn whole(dir: &Path) {
    let data = memory(9 * MIB + 4096, 1);
    let (root, digest) = (root(dir), blob(dir, &data, None));
    let ram = unpack(&root, vec![opened(dir, digest)], 3);
    assert_eq!((ram.digest.as_str(), ram.parents.len(), ram.mlock), (digest.to_string().as_str(), 0, false));
    assert!(fs::read(&ram.memory).unwrap() == data);
    let (head, sections) = StateFile::read(&File::open(&ram.state).unwrap()).unwrap();
    assert_eq!((head.memory, sections[0].payload.as_slice()), (data.len() as u64, &b"state"[..]));
    let found = fs::metadata(&ram.memory).unwrap();
    assert!(found.blocks() * 512 < found.len() * 5 / 7, "zero pages are not holes: {} blocks", found.blocks());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    assert_eq!(names(&root), [digest.hex()]);
    let again = ram::unpack(&root, vec![opened(dir, digest)], &options(1), &mut |p| panic!("{p:?} was done twice"));
    assert_eq!(again.unwrap(), ram);
}

fn chain_of_diffs(dir: &Path) {
    let base = memory(4 * MIB, 1);
    let mut middle = base.clone();
    middle[MIB..][..CHUNK].fill(0);
    let mut newest = middle.clone();
    newest[3 * MIB..][..7].fill(9);
    let a = blob(dir, &base, None);
    let b = blob(dir, &middle, Some((a, &base)));
    let c = blob(dir, &newest, Some((b, &middle)));
    let mut open = |digest: &Digest| {
        let found = opened(dir, *digest);
        Ok(Some((found.file, found.size)))
    };
    let root = root(dir);
    let ram = unpack(&root, ram::chain(c, &mut open).unwrap(), 0);
    assert!(fs::read(&ram.memory).unwrap() == newest);
    assert_eq!(ram.parents, [b.to_string(), a.to_string()]);
    assert_eq!(ram::find(&root, &c).unwrap().as_ref(), Some(&ram));
    let mut lacking = |digest: &Digest| if *digest == a { Ok(None) } else { open(digest) };
    let error = told(&ram::chain(c, &mut lacking).unwrap_err());
    assert!(error.contains(&format!("the image lacks blob {a}, the parent of {b}")), "{error}");
}

fn without_privileges(dir: &Path) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let digest = blob(dir, &memory(64 * MIB, 5), None);
    let out = dir.join("out");
    fs::create_dir(&out).unwrap();
    let (seen, me) = (AtomicUsize::new(0), std::process::id());
    let mut look = |_: Progress| {
        for child in fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap().split_whitespace() {
            for task in fs::read_dir(format!("/proc/{child}/task")).into_iter().flatten().flatten() {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                let field = |name: &str| {
                    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
                    line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
                };
                if field("Seccomp:") == ["2"] {
                    assert_eq!(field("Uid:"), ["65534"; 4]);
                    assert_eq!((field("CapEff:"), field("NoNewPrivs:")), (vec!["0".repeat(16)], vec!["1".into()]));
                    seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        true
    };
    let job = RamJob { blobs: vec![opened(dir, digest)], dir: &out, max_memory: 1 << 30, threads: 4 };
    Launcher::new().unpack_ram(job, &mut look).unwrap();
    assert!(seen.into_inner() >= 1, "no thread of a worker was seen");
}

fn hostile(dir: &Path) {
    let data = memory(2 * MIB, 3);
    let (root, digest) = (root(dir), blob(dir, &data, None));
    let good = fs::read(dir.join(digest.hex())).unwrap();
    let refused = |bytes: &[u8], name: Option<Digest>, verified: bool, max_memory: u64, want: &str| {
        let path = dir.join("hostile");
        fs::write(&path, bytes).unwrap();
        let digest = name.unwrap_or_else(|| Digest::of(bytes));
        let file = File::open(&path).unwrap();
        let blob = RamBlob { digest, size: bytes.len() as u64, file, verified };
        let options = RamOptions { max_memory, ..options(2) };
        let error = ram::unpack(&root, vec![blob], &options, &mut |_| true).unwrap_err();
        assert!(matches!(error, Error::Ram { .. }), "{error:?}");
        let text = told(&error);
        assert!(text.contains(want) && text.contains(&digest.to_string()), "{want}: {text}");
        assert!(names(&root).is_empty(), "{:?}", names(&root));
    };
    refused(b"not one", None, false, 1 << 30, "no RAM snapshot");
    refused(&lz4_of_something(), None, false, 1 << 30, "no RAM snapshot");
    refused(&good, None, false, MIB as u64, "at most 1048576 are allowed");
    refused(&good[..good.len() - 1], None, true, 1 << 30, "damaged");
    refused(&good, Some(Digest::of(b"another")), false, 1 << 30, "the checksum of the blob");
    let mut flipped = good.clone();
    flipped[100] ^= 1;
    refused(&flipped, None, true, 1 << 30, "chunk");
    let diff = blob(dir, &data, Some((digest, &data)));
    let alone = fs::read(dir.join(diff.hex())).unwrap();
    refused(&alone, None, false, 1 << 30, "the parent sha256:");
}

/// The beginning of an lz4 frame, as another tool's RAM snapshot may be one.
fn lz4_of_something() -> Vec<u8> {
    let mut frame = vec![0x04, 0x22, 0x4d, 0x18];
    frame.extend([0x60, 0x40, 0x82].iter().cycle().take(500));
    frame
}

fn two_at_once(dir: &Path) {
    let data = memory(24 * MIB, 7);
    let (root, digest) = (root(dir), blob(dir, &data, None));
    let worked = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut mine = 0;
                let mut tell = |p: Progress| {
                    mine = mine.max(p.done);
                    true
                };
                let ram = ram::unpack(&root, vec![opened(dir, digest)], &options(1), &mut tell).unwrap();
                assert!(fs::read(&ram.memory).unwrap() == data);
                worked.fetch_add(usize::from(mine > 0), Ordering::Relaxed);
            });
        }
    });
    assert!(worked.into_inner() <= 1, "more than one unpacked it");
    assert_eq!(names(&root), [digest.hex()]);
}

/// Unpacks until it is killed: its progress stops at the first step.
fn victim(root: &Path, blob: &Path) -> ExitCode {
    let file = File::open(blob).unwrap();
    let digest = Digest::of(&fs::read(blob).unwrap());
    let blob = RamBlob { digest, size: file.metadata().unwrap().len(), file, verified: true };
    let _ = ram::unpack(root, vec![blob], &options(1), &mut |_| loop {
        println!("working");
        thread::sleep(Duration::from_secs(60));
    });
    ExitCode::SUCCESS
}

fn killed(dir: &Path) {
    let data = memory(32 * MIB, 11);
    let (root, digest) = (root(dir), blob(dir, &data, None));
    let other = blob(dir, &memory(2 * MIB, 13), None);
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([VICTIM.as_ref(), root.as_os_str(), dir.join(digest.hex()).as_os_str()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 7];
    std::io::Read::read_exact(victim.stdout.as_mut().unwrap(), &mut line).unwrap();
    let left = format!(".{}.new", digest.hex());
    assert_eq!(names(&root), std::slice::from_ref(&left));
    // Another one's sweep leaves alone what has a maker.
    unpack(&root, vec![opened(dir, other)], 1);
    assert!(names(&root).contains(&left));
    victim.kill().unwrap();
    victim.wait().unwrap();
    let started = Instant::now();
    let ram = unpack(&root, vec![opened(dir, digest)], 2);
    assert!(started.elapsed() < Duration::from_secs(30));
    assert!(fs::read(&ram.memory).unwrap() == data);
    let mut found = names(&root);
    found.sort();
    let mut want = [digest.hex(), other.hex()];
    want.sort();
    assert_eq!(found, want);
}

fn giving_up(dir: &Path) {
    let (root, digest) = (root(dir), blob(dir, &memory(32 * MIB, 17), None));
    let error = ram::unpack(&root, vec![opened(dir, digest)], &options(1), &mut |_| false).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error:?}");
    assert!(names(&root).is_empty(), "{:?}", names(&root));
}

fn killed_worker(dir: &Path) {
    let (root, digest) = (root(dir), blob(dir, &memory(64 * MIB, 19), None));
    let me = std::process::id();
    let mut kill = |_: Progress| {
        let children = fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap();
        for child in children.split_whitespace() {
            assert!(Command::new("kill").args(["-9", child]).status().unwrap().success());
        }
        true
    };
    let error = ram::unpack(&root, vec![opened(dir, digest)], &options(1), &mut kill).unwrap_err();
    assert!(told(&error).contains("its worker failed: it ended without an answer (killed by signal 9)"), "{error:?}");
    assert!(names(&root).is_empty(), "{:?}", names(&root));
}

/// An image with a RAM blob.
fn build(dir: &Path, ram: &Path, sink: Box<dyn Sink>) {
    let mut manifest = Manifest::new("test/ram", "1");
    manifest.ram_snapshot = Some(RamSnapshot {
        reference: Ref::File("ram".into()),
        compression: RamCompression::Lz4,
        preload_hint: false,
        mlock_required: true,
        extra: Default::default(),
    });
    let mut kernel = vec![0_u8; 4096];
    kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(dir.join("kernel"), &kernel).unwrap();
    manifest.kernel = Some(Kernel { reference: Ref::File("kernel".into()), args: None, extra: Default::default() });
    let (kernel, ram) = (Some(dir.join("kernel")), Some(ram.to_owned()));
    let recipe = Recipe { manifest, kernel, initrd: None, disks: Vec::new(), ram_snapshot: ram };
    recipe.build(sink, BuildOptions::default(), &Quiet).unwrap();
}

fn cache(dir: &Path, name: &str, max_ram: Option<u64>) -> Cache {
    let options = Options { launcher: Launcher::new(), limits: Limits::default(), max_boot_file: 1 << 30, max_ram };
    Cache::open(&dir.join(name), options).unwrap()
}

/// Unpacks the only image of a layout.
fn unpack_layout(cache: &Cache, layout: &Path, tell: &mut dyn FnMut(Step)) -> ovms_bundle::Result<ovms_bundle::Record> {
    let layout = Layout::open(layout).unwrap();
    let image = layout.select(None).unwrap();
    cache.unpack(&layout, &image, tell)
}

fn layout_with_ram(dir: &Path) {
    let data = memory(6 * MIB, 1);
    let digest = blob(dir, &data, None);
    let (layout, tar) = (dir.join("layout"), dir.join("image.tar"));
    build(dir, &dir.join(digest.hex()), Box::new(DirSink::create(&layout).unwrap()));
    build(dir, &dir.join(digest.hex()), Box::new(TarSink::create(&tar, 0).unwrap()));
    for (image, name) in [(&layout, "one"), (&tar, "two")] {
        let record = unpack_layout(&cache(dir, name, Some(1 << 30)), image, &mut |_| {});
        let ram = record.unwrap_or_else(|e| panic!("{}", told(&e))).ram.unwrap();
        assert_eq!((ram.digest.as_str(), ram.mlock), (digest.to_string().as_str(), true));
        assert!(fs::read(&ram.memory).unwrap() == data);
        assert_eq!(fs::read_dir(dir.join(name).join("tmp")).unwrap().count(), 0);
    }
    assert_eq!(unpack_layout(&cache(dir, "one", None), &layout, &mut |_| {}).unwrap().ram, None);
}

fn layout_without(dir: &Path) {
    let base = memory(2 * MIB, 1);
    let parent = blob(dir, &base, None);
    let mut data = base.clone();
    data[0] ^= 1;
    let diff = blob(dir, &data, Some((parent, &base)));
    let layout = dir.join("layout");
    build(dir, &dir.join(diff.hex()), Box::new(DirSink::create(&layout).unwrap()));
    let error = told(&unpack_layout(&cache(dir, "one", Some(1 << 30)), &layout, &mut |_| {}).unwrap_err());
    assert!(error.contains(&format!("lacks blob {parent}")), "{error}");
    // Something else under a RAM snapshot's type.
    let other = dir.join("other");
    fs::write(&other, lz4_of_something()).unwrap();
    let layout = dir.join("layout-2");
    build(dir, &other, Box::new(DirSink::create(&layout).unwrap()));
    let error = told(&unpack_layout(&cache(dir, "one", Some(1 << 30)), &layout, &mut |_| {}).unwrap_err());
    assert!(error.contains("no RAM snapshot of ovms"), "{error}");
}
