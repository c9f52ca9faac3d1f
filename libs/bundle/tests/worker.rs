//! The worker as a real process, and everything that is made through it. The worker is the running program started
//! again, so this one has a `main` of its own: it becomes the worker, or runs the cases below.

#![allow(missing_docs)]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    panic,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
};

use ovms_artifact::{
    build::{Options as BuildOptions, Recipe},
    digest::{Digest, VerifyingReader},
    layer::{self as blob_layer, Encoding, LayerError, ReadLayer},
    layout::{DirSink, Layout, Quiet, Sink, TarSink},
    manifest::{DiskFormat, Kernel, Manifest, Ref},
    media::{self, Compression},
};
use ovms_bundle::{
    layer,
    unpack::{instantiate, Cache, Options, Step},
    worker::{intercept, Job, Launcher, LayerReader, Limits, Outcome, Source, Unpacked},
    Bundle, Error,
};
use ovms_disk::{qcow2::Plan, LayerMap, Stack, StackFiles, State, Table, Top, TopFiles};

const MIB: usize = 1 << 20;

type Case = (&'static str, fn(&Path));

fn main() -> ExitCode {
    if let Some(code) = intercept() {
        return code;
    }
    let cases: &[Case] = &[
        ("qcow2_in_a_tar_is_unpacked_with_its_descriptor", qcow2_in_a_tar),
        ("every_compression_gives_the_same_layer", every_compression),
        ("raw_disks_bare_or_wrapped_are_unpacked", raw_disks),
        ("a_pipe_is_read_like_a_file", a_pipe),
        ("a_disk_file_without_a_blob_is_converted", a_disk_file),
        ("ordinary_layer_returns_its_first_file", ordinary_layer),
        ("layer_with_a_descriptor_alone_leaves_no_files", descriptor_alone),
        ("hostile_layers_are_refused_by_name", hostile_layers),
        ("layer_beyond_the_limits_is_refused", beyond_the_limits),
        ("worker_runs_without_privileges", without_privileges),
        ("compressed_layers_are_looked_into_by_a_worker", looked_into),
        ("what_looking_into_a_layer_refuses_is_told", looking_refuses),
        ("layout_becomes_instances_with_tops_of_their_own", layout_becomes_instances),
        ("layout_in_a_tar_gives_the_same_cache", layout_in_a_tar),
        ("disk_in_use_returns_its_holder", disk_in_use),
    ];
    let wanted = std::env::args().nth(1).filter(|a| !a.starts_with('-'));
    let mut failed = 0;
    for (name, case) in cases.iter().filter(|(name, _)| wanted.as_ref().is_none_or(|w| name.contains(w.as_str()))) {
        let dir = tempfile::tempdir().unwrap();
        let result = panic::catch_unwind(|| case(dir.path()));
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
        failed += u32::from(result.is_err());
    }
    ExitCode::from(u8::from(failed > 0))
}

/// Bytes that do not compress to nothing and differ by seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A qcow2 of `size` bytes with the given pieces, written by our own writer.
fn qcow2(dir: &Path, size: u64, pieces: &[(u64, &[u8])]) -> Vec<u8> {
    let file = |name: &str| {
        let path = dir.join(format!("q-{name}"));
        File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap()
    };
    let (table, data, map) = (file("table"), file("data"), file("map"));
    Table::empty(size).unwrap().write_to(&table).unwrap();
    Top::create(&data, &map, size).unwrap();
    let top = Some(TopFiles { data, map });
    let stack = Stack::open(StackFiles { table, layers: vec![], frozen: vec![], top }, false).unwrap();
    for (offset, bytes) in pieces {
        stack.write_at(*offset, bytes).unwrap();
    }
    let mut image = Vec::new();
    Plan::diff(&stack).unwrap().write_to(&mut image).unwrap();
    image
}

fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        // Past the crate's own check of names, as a hostile writer would.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn layer_source(media_type: &str, format: Option<&str>) -> Source {
    Source::Layer { media_type: media_type.into(), format: format.map(Into::into) }
}

fn run(dir: &Path, blob: &[u8], source: Source, limits: Limits) -> ovms_bundle::Result<Outcome> {
    let path = dir.join("blob");
    fs::write(&path, blob).unwrap();
    let expect = match source {
        Source::Layer { .. } => Some((Digest::of(blob), blob.len() as u64)),
        Source::Disk { .. } => None,
    };
    let job = Job { name: "sha256:test", input: File::open(&path).unwrap(), source, expect, dir, limits };
    let mut last = 0;
    Launcher::new().unpack(job, &mut |p| last = p.done.max(last))
}

fn unpacked(dir: &Path, blob: &[u8], source: Source) -> Unpacked {
    match run(dir, blob, source, Limits::default()).unwrap_or_else(|e| panic!("{}", chain(&e))) {
        Outcome::Layer(unpacked) => unpacked,
        other => panic!("{other:?}"),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn refusal(dir: &Path, blob: &[u8], source: Source) -> String {
    let error = run(dir, blob, source, Limits::default()).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    assert!(!layer::data_path(dir).exists() && !layer::map_path(dir).exists(), "files were left");
    chain(&error)
}

fn data_at(dir: &Path, offset: usize, len: usize) -> Vec<u8> {
    fs::read(layer::data_path(dir)).unwrap()[offset..offset + len].to_vec()
}

fn states(map: &LayerMap) -> Vec<(u64, u64, State)> {
    map.extents().map(|e| (e.start, e.len, e.state)).collect()
}

const DESCRIPTOR: &[u8] =
    br#"{"schemaVersion":1,"mediaType":"application/vnd.ovms.manifest.v1+json","name":"a/b","version":"1"}"#;

fn qcow2_in_a_tar(dir: &Path) {
    let bytes = noise(1, MIB);
    let image = qcow2(dir, 8 * MIB as u64, &[(2 * MIB as u64, &bytes)]);
    let blob = tar_of(&[("ovm/manifest.json", DESCRIPTOR), ("ovm/disk.qcow2", &image)]);
    let found = unpacked(dir, &blob, layer_source(media::OCI_LAYER, None));
    assert_eq!(found.diff_id, Some(Digest::of(&blob)));
    assert_eq!(found.descriptor.as_deref().map(str::as_bytes), Some(DESCRIPTOR));
    let disk = found.disk.unwrap();
    assert_eq!((disk.format, disk.bare), (DiskFormat::Qcow2, false));
    assert_eq!((disk.virtual_size, disk.data_bytes), (8 * MIB as u64, MIB as u64));
    assert_eq!(disk.file_digest, Some(Digest::of(&image)));
    assert_eq!(data_at(dir, 2 * MIB, MIB), bytes);
    let mib = MIB as u64;
    let want = [(0, 2 * mib, State::Absent), (2 * mib, mib, State::Data), (3 * mib, 5 * mib, State::Absent)];
    assert_eq!(states(&layer::load_map(dir).unwrap()), want);
    assert!(fs::metadata(layer::data_path(dir)).unwrap().blocks() * 512 < 2 * mib, "the data file is not sparse");
}

fn every_compression(dir: &Path) {
    let bytes = noise(2, 3 * MIB);
    let image = qcow2(dir, 8 * MIB as u64, &[(512, &bytes)]);
    let tar = tar_of(&[("ovm/disk.qcow2", &image)]);
    let zstd = zstd::encode_all(&tar[..], 3).unwrap();
    for (blob, media_type) in
        [(tar.clone(), media::OCI_LAYER), (gzip(&tar), media::OCI_LAYER_GZIP), (zstd, media::OCI_LAYER_ZSTD)]
    {
        let found = unpacked(dir, &blob, layer_source(media_type, None));
        assert_eq!(found.diff_id, Some(Digest::of(&tar)), "{media_type}");
        assert_eq!(data_at(dir, 512, bytes.len()), bytes, "{media_type}");
        fs::remove_file(layer::data_path(dir)).unwrap();
        fs::remove_file(layer::map_path(dir)).unwrap();
    }
}

fn raw_disks(dir: &Path) {
    // Not a whole number of sectors, with a hole of zeros inside.
    let mut raw = noise(3, 5 * MIB + 100);
    raw[MIB..3 * MIB].fill(0);
    let wrapped = tar_of(&[("ovm/disk.raw", &raw)]);
    for (i, (blob, annotation)) in [(raw.clone(), Some("raw")), (wrapped, None)].into_iter().enumerate() {
        let dir = dir.join(i.to_string());
        fs::create_dir(&dir).unwrap();
        let disk = unpacked(&dir, &blob, layer_source(media::OCI_LAYER, annotation)).disk.unwrap();
        let size = (5 * MIB as u64 + 100).next_multiple_of(512);
        assert_eq!((disk.virtual_size, disk.file_size, disk.bare), (size, raw.len() as u64, i == 0));
        let data = fs::read(layer::data_path(&dir)).unwrap();
        assert!(data.len() as u64 == size && data[..raw.len()] == raw && data[raw.len()..].iter().all(|b| *b == 0));
        let mib = MIB as u64;
        let want = [(0, mib, State::Data), (mib, 2 * mib, State::Zero), (3 * mib, size - 3 * mib, State::Data)];
        assert_eq!(states(&layer::load_map(&dir).unwrap()), want);
    }
}

fn a_pipe(dir: &Path) {
    let image = qcow2(dir, 4 * MIB as u64, &[(0, &noise(4, 2 * MIB))]);
    let blob = gzip(&tar_of(&[("ovm/disk.qcow2", &image)]));
    let expect = Some((Digest::of(&blob), blob.len() as u64));
    let (reader, mut writer) = std::io::pipe().unwrap();
    let feeder = thread::spawn(move || writer.write_all(&blob).unwrap());
    let input = File::from(std::os::fd::OwnedFd::from(reader));
    let source = layer_source(media::OCI_LAYER_GZIP, None);
    let job = Job { name: "pipe", input, source, expect, dir, limits: Limits::default() };
    let outcome = Launcher::new().unpack(job, &mut |_| {}).unwrap();
    feeder.join().unwrap();
    assert!(matches!(outcome, Outcome::Layer(Unpacked { disk: Some(_), .. })));
    assert_eq!(data_at(dir, 0, 2 * MIB), noise(4, 2 * MIB));
}

fn a_disk_file(dir: &Path) {
    let image = qcow2(dir, 4 * MIB as u64, &[(MIB as u64, &noise(5, 4096))]);
    let found = unpacked(dir, &image, Source::Disk { format: DiskFormat::Qcow2 });
    assert_eq!((found.diff_id, found.disk.unwrap().bare), (None, true));
    assert_eq!(data_at(dir, MIB, 4096), noise(5, 4096));
}

fn ordinary_layer(dir: &Path) {
    let blob = tar_of(&[("etc/passwd", b"root"), ("bin/sh", b"#!")]);
    let outcome = run(dir, &blob, layer_source(media::OCI_LAYER, None), Limits::default()).unwrap();
    assert_eq!(outcome, Outcome::Ordinary { first: "etc/passwd".into() });
    assert!(!layer::data_path(dir).exists() && !layer::map_path(dir).exists());
}

fn descriptor_alone(dir: &Path) {
    let blob = tar_of(&[("ovm/manifest.json", DESCRIPTOR)]);
    let found = unpacked(dir, &blob, layer_source(media::OCI_LAYER, None));
    assert!(found.disk.is_none() && found.descriptor.is_some());
    assert!(!layer::data_path(dir).exists() && !layer::map_path(dir).exists());
}

fn hostile_layers(dir: &Path) {
    let image = qcow2(dir, 4 * MIB as u64, &[(0, &noise(6, 4096))]);
    let with = |offset: usize, bytes: &[u8]| {
        let mut bad = image.clone();
        bad[offset..offset + bytes.len()].copy_from_slice(bytes);
        tar_of(&[("ovm/disk.qcow2", &bad)])
    };
    // A backing file name of 11 bytes at 512.
    let mut backed = image.clone();
    backed[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 11]);
    backed[512..523].copy_from_slice(b"/etc/shadow");
    let whole = tar_of(&[("ovm/disk.qcow2", &image)]);
    let cases: Vec<(Vec<u8>, Option<&str>, &str)> = vec![
        (tar_of(&[("ovm/disk.qcow2", &backed)]), None, "backing file \"/etc/shadow\""),
        (with(79, &[4]), None, "external data file"),
        (with(72, &[0x80]), None, "unknown incompatible feature bit 63"),
        (with(24, &[0x7f]), None, "virtual size"),
        (with(44, &[0x7f]), None, "L1 table"),
        (tar_of(&[("ovm/disk.qcow2", b"not a qcow2")]), None, "no qcow2 image"),
        (tar_of(&[("ovm/disk.qcow2", &image), ("../../etc/cron.d/x", b"x")]), None, "not allowed"),
        (tar_of(&[("ovm/disk.qcow2", &image), ("ovm/disk.raw", &image)]), None, "may hold one"),
        (whole[..whole.len() / 2].to_vec(), None, "cannot be"),
        (noise(7, 4096), None, "no ovms.format annotation"),
        (noise(7, 4096), Some("vmdk"), "\"vmdk\" is not supported"),
        // The layer of somebody else's container image, which must never become a disk under its own digest.
        (tar_of(&[("bin/busybox", b"elf"), ("etc/passwd", b"x")]), Some("raw"), "(first file \"bin/busybox\")"),
        (vec![0; 1024], Some("raw"), "an empty tar archive"),
        (image.clone(), Some("raw"), "begins like a qcow2 file"),
    ];
    for (blob, annotation, want) in cases {
        let why = refusal(dir, &blob, layer_source(media::OCI_LAYER, annotation));
        assert!(why.contains(want), "{why:?} does not contain {want:?}");
    }
    // Content that is not what its digest says.
    let blob = tar_of(&[("ovm/disk.qcow2", &image)]);
    let path = dir.join("blob");
    fs::write(&path, &blob).unwrap();
    let input = File::open(&path).unwrap();
    let expect = Some((Digest::of(b"other"), blob.len() as u64));
    let source = layer_source(media::OCI_LAYER, None);
    let job = Job { name: "n", input, source, expect, dir, limits: Limits::default() };
    let why = chain(&Launcher::new().unpack(job, &mut |_| {}).unwrap_err());
    assert!(why.contains(&Digest::of(b"other").to_string()), "{why}");
}

fn beyond_the_limits(dir: &Path) {
    let small = Limits { disk_virtual: 4 * MIB as u64, layer_data: 2 * MIB as u64, layer_ratio: 2000 };
    let cases: [(Vec<u8>, &str, &str); 3] = [
        (qcow2(dir, 8 * MIB as u64, &[]), "ovm/disk.qcow2", "virtual size of 8388608 exceeds"),
        (noise(8, 3 * MIB), "ovm/disk.raw", "more than the 2097152 bytes allowed"),
        (qcow2(dir, 4 * MIB as u64, &[(0, &noise(9, 3 * MIB))]), "ovm/disk.qcow2", "more than the 2097152 bytes"),
    ];
    for (disk, name, want) in cases {
        let blob = gzip(&tar_of(&[(name, &disk)]));
        let why = chain(&run(dir, &blob, layer_source(media::OCI_LAYER_GZIP, None), small).unwrap_err());
        assert!(why.contains(want), "{why:?} does not contain {want:?}");
    }
}

/// Looks at a worker that waits for its input.
fn without_privileges(dir: &Path) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let input = File::from(std::os::fd::OwnedFd::from(reader));
    let blob = tar_of(&[("ovm/manifest.json", DESCRIPTOR)]);
    let size = blob.len() as u64;
    let expect = Some((Digest::of(&blob), size));
    let source = layer_source(media::OCI_LAYER, None);
    let leaked = File::open("/dev/zero").unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let job = Job { name: "idle", input, source, expect, dir, limits: Limits::default() };
            Launcher::new().unpack(job, &mut |_| {})
        });
        writer.write_all(&blob[..1024]).unwrap();
        let (pid, status) = wait_for_seccomp();
        // Standard streams, the socket, and the four files; not the descriptor that was left open on purpose.
        let fds: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().collect();
        let targets: Vec<_> = fds.iter().map(|fd| fs::read_link(fd.path()).unwrap()).collect();
        assert!(targets.len() == 8 && !targets.contains(&"/dev/zero".into()), "{targets:?}");
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
            line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(field("Seccomp:"), ["2"]);
        assert_eq!(field("NoNewPrivs:"), ["1"]);
        if fs::metadata("/proc/self").unwrap().uid() == 0 {
            assert_eq!(field("Uid:"), ["65534"; 4]);
            assert_eq!(field("Gid:"), ["65534"; 4]);
            assert!(field("Groups:").is_empty());
            assert_eq!((field("CapEff:"), field("CapPrm:")), (vec!["0".repeat(16)], vec!["0".repeat(16)]));
        }
        writer.write_all(&blob[1024..]).unwrap();
        drop(writer);
        worker.join().unwrap().unwrap();
    });
}

/// A blob that waits, after its first bytes, until our child is one with a filter.
struct Watched<'a> {
    blob: &'a [u8],
    first: usize,
    seen: bool,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.first == 0 && !self.seen {
            let (_, status) = wait_for_seccomp();
            self.seen = status.contains("NoNewPrivs:\t1");
        }
        let most = if self.first > 0 { self.first } else { buffer.len() };
        let n = self.blob.read(&mut buffer[..most])?;
        self.first = self.first.saturating_sub(n);
        Ok(n)
    }
}

fn looker(limits: Limits) -> LayerReader {
    LayerReader { launcher: Launcher::new(), limits }
}

fn looked_into(dir: &Path) {
    let image = qcow2(dir, 8 * MIB as u64, &[(MIB as u64, &noise(12, MIB))]);
    let tar = tar_of(&[("ovm/manifest.json", DESCRIPTOR), ("ovm/disk.qcow2", &image)]);
    let zstd = zstd::encode_all(&tar[..], 3).unwrap();
    let here = blob_layer::Limits::default();
    for (blob, compression) in [(gzip(&tar), Compression::Gzip), (zstd, Compression::Zstd)] {
        let encoding = Encoding { compression, annotated: None };
        let mut watched = Watched { blob: &blob, first: 100, seen: false };

        let found = looker(Limits::default()).read_layer(&mut watched, encoding).unwrap();

        assert!(watched.seen && watched.blob.is_empty());
        assert_eq!(found, here.read_layer(&mut &blob[..], encoding).unwrap());
        assert_eq!((found.diff_id, found.descriptor.as_deref()), (Digest::of(&tar), Some(DESCRIPTOR)));
    }
    // What is not compressed needs no worker.
    let plain = Encoding { compression: Compression::None, annotated: None };
    let found = looker(Limits::default()).read_layer(&mut &tar[..], plain).unwrap();
    assert_eq!(found, here.read_layer(&mut &tar[..], plain).unwrap());
}

fn looking_refuses(dir: &Path) {
    let encoding = |annotated| Encoding { compression: Compression::Gzip, annotated };
    let look = |tar: &[u8], annotated, limits| {
        looker(limits).read_layer(&mut &gzip(tar)[..], encoding(annotated)).unwrap_err()
    };
    let ordinary = tar_of(&[("etc/passwd", b"root"), ("var/big", &noise(13, 4 * MIB))]);
    assert!(matches!(look(&ordinary, None, Limits::default()), LayerError::Ordinary(name) if name == "etc/passwd"));
    assert!(matches!(look(&[0; 1024], None, Limits::default()), LayerError::Empty));
    let why = look(&ordinary, Some(DiskFormat::Raw), Limits::default()).to_string();
    assert!(why.contains("ovms.format") && why.contains("etc/passwd"), "{why}");
    // The operator's limits, not ours.
    let small = Limits { layer_data: MIB as u64, ..Limits::default() };
    let why = look(&tar_of(&[("ovm/disk.raw", &noise(14, 2 * MIB))]), None, small).to_string();
    assert!(why.contains("more than the 1048576 bytes allowed"), "{why}");
    // Damaged, and of another digest than it should have.
    let blob = gzip(&tar_of(&[("ovm/manifest.json", DESCRIPTOR)]));
    let cut = looker(Limits::default()).read_layer(&mut &blob[..blob.len() / 2], encoding(None)).unwrap_err();
    assert!(matches!(cut, LayerError::Refused(_)), "{cut:?}");
    let mut other = VerifyingReader::new(&blob[..], Digest::of(b"other"), blob.len() as u64);
    let error = looker(Limits::default()).read_layer(&mut other, encoding(None)).unwrap_err();
    assert!(matches!(&error, LayerError::Io(e) if e.to_string().contains("wrong digest")), "{error:?}");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
}

/// The status of our one child, once its filter is on.
fn wait_for_seccomp() -> (String, String) {
    let me = std::process::id().to_string();
    for _ in 0..500 {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let child = status.lines().any(|l| l.strip_prefix("PPid:").is_some_and(|p| p.trim() == me));
            if child && status.contains("Seccomp:\t2") {
                return (entry.file_name().into_string().unwrap(), status);
            }
        }
        thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("no child of ours has a filter");
}

/// Builds a layout of a kernel, a base and a diff.
fn build(dir: &Path, sink: Box<dyn Sink>) -> (Vec<u8>, Vec<u8>) {
    let mut kernel = vec![0_u8; 4096];
    kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(dir.join("kernel"), &kernel).unwrap();
    let (base, diff) = (noise(10, 2 * MIB), noise(11, MIB));
    fs::write(dir.join("base.qcow2"), qcow2(dir, 8 * MIB as u64, &[(0, &base)])).unwrap();
    fs::write(dir.join("diff.qcow2"), qcow2(dir, 8 * MIB as u64, &[(MIB as u64, &diff)])).unwrap();
    let mut manifest = Manifest::new("test/image", "1");
    let reference = Ref::File("kernel".into());
    manifest.kernel = Some(Kernel { reference, args: Some("console=ttyS0".into()), extra: Default::default() });
    let kernel_file = Some(dir.join("kernel"));
    let mut recipe = Recipe { manifest, kernel: kernel_file, initrd: None, disks: vec![], ram_snapshot: None };
    recipe.push_disk(dir.join("base.qcow2"), DiskFormat::Qcow2);
    recipe.push_disk(dir.join("diff.qcow2"), DiskFormat::Qcow2);
    recipe.build(sink, BuildOptions::default(), &Quiet).unwrap();
    let mut disk = base;
    disk[MIB..].copy_from_slice(&diff);
    disk.resize(8 * MIB, 0);
    (kernel, disk)
}

fn cache(dir: &Path) -> Cache {
    let options = Options {
        launcher: Launcher::new(),
        limits: Limits::default(),
        max_boot_file: 1 << 30,
        max_ram: Some(1 << 30),
    };
    Cache::open(&dir.join("cache"), options).unwrap()
}

/// Unpacks the only image of a layout.
fn unpack_layout(cache: &Cache, layout: &Path, tell: &mut dyn FnMut(Step)) -> ovms_bundle::Result<ovms_bundle::Record> {
    let layout = Layout::open(layout).unwrap();
    let image = layout.select(None).unwrap();
    cache.unpack(&layout, &image, tell)
}

fn instance(dir: &Path, name: &str, template: &ovms_bundle::Record) -> PathBuf {
    let dir = dir.join(name);
    fs::create_dir(&dir).unwrap();
    instantiate(template, &dir).unwrap()
}

fn layout_becomes_instances(dir: &Path) {
    let layout = dir.join("layout");
    let (kernel, disk) = build(dir, Box::new(DirSink::create(&layout).unwrap()));
    let cache = cache(dir);
    let mut steps = Vec::new();
    let template = unpack_layout(&cache, &layout, &mut |step| steps.push(step.what)).unwrap();
    assert!(steps.contains(&"kernel".to_owned()) && steps.contains(&"layer 2 of 2".to_owned()), "{steps:?}");
    let again = unpack_layout(&cache, &layout, &mut |step| panic!("{step:?} was done twice")).unwrap();
    assert_eq!(again, template);
    assert_eq!(fs::read_dir(dir.join("cache/tmp")).unwrap().count(), 0);

    let (a, b) = (instance(dir, "a", &template), instance(dir, "b", &template));
    let open = |record: &Path| Bundle::open(record, "a test", false).unwrap().disk.unwrap().into_stack().unwrap();
    let (one, two) = (open(&a), open(&b));
    one.write_at(4096, &[7; 4096]).unwrap();
    one.flush().unwrap();
    let mut all = vec![0; disk.len()];
    two.read_at(0, &mut all).unwrap();
    assert!(all == disk, "the second instance does not read as the image");
    drop(one);
    let mut part = [0; 4096];
    open(&a).read_at(4096, &mut part).unwrap();
    assert_eq!(part, [7; 4096]);
    let bundle = Bundle::open(&a, "a test", false).unwrap();
    let mut booted = Vec::new();
    bundle.kernel.unwrap().read_to_end(&mut booted).unwrap();
    assert_eq!(booted, kernel);
    assert_eq!(bundle.record.manifest.kernel.unwrap().args.as_deref(), Some("console=ttyS0"));
    let mode = fs::metadata(dir.join("a/top.data")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

fn layout_in_a_tar(dir: &Path) {
    let layout = dir.join("image.tar");
    let (_, disk) = build(dir, Box::new(TarSink::create(&layout, 0).unwrap()));
    let template = unpack_layout(&cache(dir), &layout, &mut |_| {}).unwrap();
    let record = instance(dir, "a", &template);
    let stack = Bundle::open(&record, "a test", true).unwrap().disk.unwrap().into_stack().unwrap();
    let mut all = vec![0; disk.len()];
    stack.read_at(0, &mut all).unwrap();
    assert!(all == disk);
}

fn disk_in_use(dir: &Path) {
    let layout = dir.join("layout");
    build(dir, Box::new(DirSink::create(&layout).unwrap()));
    let template = unpack_layout(&cache(dir), &layout, &mut |_| {}).unwrap();
    let record = instance(dir, "a", &template);
    let first = Bundle::open(&record, "machine default/vm1", false).unwrap();
    for read_only in [false, true] {
        let error = Bundle::open(&record, "machine default/vm2", read_only).unwrap_err();
        assert!(chain(&error).ends_with("top.data is in use by machine default/vm1"), "{}", chain(&error));
    }
    // A copy of the descriptor, as a VMM gets it, keeps the lock.
    let copy = first.disk.as_ref().unwrap().top_data.try_clone().unwrap();
    drop(first);
    assert!(matches!(Bundle::open(&record, "x", false), Err(Error::InUse { .. })));
    drop(copy);
    let _one = Bundle::open(&record, "reader 1", true).unwrap();
    let _two = Bundle::open(&record, "reader 2", true).unwrap();
    assert!(matches!(Bundle::open(&record, "x", false), Err(Error::InUse { .. })));
    assert!(matches!(Bundle::open(&dir.join("none.json"), "x", false), Err(Error::Io { .. })));
}
