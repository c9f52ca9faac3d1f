//! Random operation traces with QEMU's tools as the oracle, in both directions: what they write we must read alike, and
//! what we write they must read alike and find sound. Without `qemu-img` these tests say so and pass.

#![allow(missing_docs)]

mod common;

use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt},
};

use common::{read_all, stack_of, Dir};
use ovms_disk::{
    layer::{self, Format, Limits},
    qcow2::Plan,
    Stack, StackFiles, Table, Top, TopFiles,
};
use proptest::prelude::*;

const KIB: u64 = 1024;

/// One step of a trace; offsets and lengths are in sectors and get cut to the disk.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
}

fn steps(sectors: u64) -> impl Strategy<Value = Vec<Step>> {
    let range = (0..sectors, prop_oneof![1..9_u64, 1..600_u64]);
    let step = prop_oneof![
        5 => (range.clone(), 1..=255_u8).prop_map(|((o, l), p)| Step::Write(o, l, p)),
        2 => range.clone().prop_map(|(o, l)| Step::Zero(o, l)),
        1 => range.prop_map(|(o, l)| Step::Discard(o, l)),
    ];
    prop::collection::vec(step, 1..12)
}

/// How an image is made.
#[derive(Debug, Clone)]
struct Make {
    sectors: u64,
    options: String,
    compress: Option<&'static str>,
    steps: Vec<Step>,
}

fn make() -> impl Strategy<Value = Make> {
    let bits = 9..=21_u32;
    let refcount = prop::sample::select(vec![1, 2, 4, 8, 16, 32, 64]);
    let compress = prop::option::weighted(0.4, prop::sample::select(vec!["zlib", "zstd"]));
    (8_u64..16_384, bits, any::<bool>(), any::<bool>(), refcount, compress).prop_flat_map(
        |(sectors, bits, old, extended, refcount, compress)| {
            let mut options = format!("cluster_size={}", 1 << bits);
            if old && compress != Some("zstd") {
                options += ",compat=0.10";
            } else {
                options += &format!(",compat=1.1,refcount_bits={refcount}");
                if extended && bits >= 14 {
                    options += ",extended_l2=on";
                }
            }
            let options = Just(options);
            (Just(sectors), options, Just(compress), steps(sectors))
                .prop_map(|(sectors, options, compress, steps)| Make { sectors, options, compress, steps })
        },
    )
}

/// Makes an image with qemu-img, above one of a name and format, and plays its trace with qemu-io.
fn build(dir: &Dir, name: &str, make: &Make, backing: Option<(&str, &str)>) {
    let size = (make.sectors * 512).to_string();
    let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &make.options];
    if let Some((backing, format)) = backing {
        create.extend(["-b", backing, "-F", format]);
    }
    create.extend([name, &size]);
    dir.qemu_img(&create);
    let mut commands = Vec::new();
    for step in &make.steps {
        let cut = |o: &u64, l: &u64| format!("{} {}", o * 512, (*l).min(make.sectors - o) * 512);
        commands.push(match step {
            // Some of the data compresses badly, so that compressed clusters have all lengths.
            Step::Write(o, l, p) if p % 2 == 0 => format!("write -q -s noise {}", cut(o, l)),
            Step::Write(o, l, p) => format!("write -q -P {p} {}", cut(o, l)),
            Step::Zero(o, l) => format!("write -q -z {}", cut(o, l)),
            Step::Discard(o, l) => format!("discard -q {}", cut(o, l)),
        });
    }
    dir.qemu_io(name, &commands);
    if let Some(kind) = make.compress {
        let mut options = make.options.clone();
        if kind == "zstd" {
            options += ",compression_type=zstd";
        }
        let packed = format!("{name}.packed");
        let mut convert = vec!["convert", "-q", "-c", "-f", "qcow2", "-O", "qcow2", "-o", &options];
        if let Some((backing, format)) = backing {
            convert.extend(["-B", backing, "-F", format]);
        }
        convert.extend([name, &packed]);
        dir.qemu_img(&convert);
        std::fs::rename(dir.path(&packed), dir.path(name)).unwrap();
        // Plain clusters among the compressed ones.
        dir.qemu_io(name, &["write -q -P 77 0 4k".into()]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: common::cases(48), failure_persistence: None, ..ProptestConfig::default() })]

    /// A chain of up to three images of any sizes and options reads as QEMU reads it.
    #[test]
    fn chain_from_qemu_reads_alike(makes in prop::collection::vec(make(), 1..4)) {
        let Some(dir) = Dir::with_qemu() else { return Ok(()) };
        let names: Vec<String> = (0..makes.len()).map(|i| format!("l{i}.qcow2")).collect();
        for (i, make) in makes.iter().enumerate() {
            let backing = i.checked_sub(1).map(|b| (names[b].as_str(), "qcow2"));
            build(&dir, &names[i], make, backing);
        }
        dir.qemu_img(&["convert", "-q", "-f", "qcow2", "-O", "raw", names.last().unwrap(), "want.raw"]);
        for name in &names[1..] {
            dir.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "", name]);
        }
        let stack = stack_of(&dir, &names.iter().map(|n| (n.as_str(), Format::Qcow2)).collect::<Vec<_>>(), None);
        let want = std::fs::read(dir.path("want.raw")).unwrap();
        prop_assert_eq!(stack.size(), want.len() as u64);
        prop_assert!(read_all(&stack) == want);
    }

    /// A raw file with holes, of any number of sectors, reads as QEMU reads it, alone and under a qcow2 diff of another size.
    #[test]
    fn diff_on_a_sparse_raw_base_reads_alike(
        sectors in 1..12_000_u64,
        pieces in prop::collection::vec((0..12_000_u64, 1..300_u64, 0..4_u8), 0..8),
        diff in make(),
    ) {
        let Some(dir) = Dir::with_qemu() else { return Ok(()) };
        let base = dir.file("base.raw");
        base.set_len(sectors * 512).unwrap();
        for (at, length, fill) in &pieces {
            let at = at % sectors;
            let length = (*length).min(sectors - at);
            // A fill of 0 is data that happens to be zeros, no hole.
            base.write_all_at(&vec![*fill; length as usize * 512], at * 512).unwrap();
        }
        let alone = stack_of(&dir, &[("base.raw", Format::Raw)], None);
        prop_assert!(read_all(&alone) == std::fs::read(dir.path("base.raw")).unwrap());
        build(&dir, "diff.qcow2", &diff, Some(("base.raw", "raw")));
        dir.qemu_img(&["convert", "-q", "-f", "qcow2", "-O", "raw", "diff.qcow2", "want.raw"]);
        dir.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "", "diff.qcow2"]);
        let stack = stack_of(&dir, &[("base.raw", Format::Raw), ("diff.qcow2", Format::Qcow2)], None);
        let want = std::fs::read(dir.path("want.raw")).unwrap();
        prop_assert_eq!(stack.size(), want.len() as u64);
        prop_assert!(read_all(&stack) == want);
    }

    /// A trace on our stack ends in the same bytes as on a plain model, across re-opening, freezing and growing, and
    /// QEMU finds our diff sound and reads the same.
    #[test]
    fn diff_for_qemu_reads_alike(base in make(), parts in prop::collection::vec((steps(16_384), 0..2000_u64), 1..4)) {
        let Some(dir) = Dir::with_qemu() else { return Ok(()) };
        build(&dir, "base.qcow2", &base, None);
        dir.qemu_img(&["convert", "-q", "-f", "qcow2", "-O", "raw", "base.qcow2", "base.raw"]);
        let mut model = std::fs::read(dir.path("base.raw")).unwrap();
        let size = model.len() as u64;
        Top::create(&dir.file("top0.data"), &dir.file("top0.map"), size).unwrap();
        let stack = stack_of(&dir, &[("base.qcow2", Format::Qcow2)], Some("top0"));
        let mut frozen = Vec::new();
        for (i, (steps, grow)) in parts.iter().enumerate() {
            play(&stack, &mut model, steps);
            stack.grow(stack.size() + grow * 512).unwrap();
            model.resize(stack.size() as usize, 0);
            let next = format!("top{}", i + 1);
            let (data, map) = (dir.file(&format!("{next}.data")), dir.file(&format!("{next}.map")));
            Top::create(&data, &map, stack.size()).unwrap();
            stack.freeze(TopFiles { data, map }).unwrap();
            frozen.push(format!("top{i}"));
        }
        prop_assert!(read_all(&stack) == model);
        drop(stack);

        let stack = open_frozen(&dir, &frozen);
        prop_assert!(read_all(&stack) == model);
        let plan = Plan::diff(&stack).unwrap();
        let mut file = File::create(dir.path("diff.qcow2")).unwrap();
        plan.write_to(&mut file).unwrap();
        prop_assert_eq!(file.metadata().unwrap().len(), plan.file_size());
        dir.qemu_img(&["check", "-q", "-f", "qcow2", "diff.qcow2"]);
        let again = stack_of(&dir, &[("base.qcow2", Format::Qcow2), ("diff.qcow2", Format::Qcow2)], None);
        prop_assert!(read_all(&again) == model);
        dir.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "diff.qcow2"]);
        dir.qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", "diff.qcow2", &dir.write("model.raw", &model)]);
    }
}

/// Plays a trace on a stack and on a plain array.
fn play(stack: &Stack, model: &mut [u8], steps: &[Step]) {
    let size = stack.size();
    for step in steps {
        let (Step::Write(o, l, _) | Step::Zero(o, l) | Step::Discard(o, l)) = step;
        let start = o * 512 % size;
        let len = (l * 512).min(size - start);
        let end = start + len;
        match step {
            Step::Write(_, _, p) => {
                stack.write_at(start, &vec![*p; len as usize]).unwrap();
                model[start as usize..end as usize].fill(*p);
            }
            Step::Zero(..) => {
                stack.write_zeroes(start, len).unwrap();
                model[start as usize..end as usize].fill(0);
            }
            Step::Discard(..) => {
                stack.discard(start, len).unwrap();
                let first = start.next_multiple_of(Top::BLOCK);
                let last = if end == size { end } else { end / Top::BLOCK * Top::BLOCK };
                if first < last {
                    model[first as usize..last as usize].fill(0);
                }
            }
        }
    }
}

fn open_frozen(dir: &Dir, names: &[String]) -> Stack {
    let top = |n: &String| TopFiles { data: dir.open(&format!("{n}.data")), map: dir.open(&format!("{n}.map")) };
    let files = StackFiles {
        table: dir.open("table"),
        layers: vec![dir.open("layer0")],
        frozen: names.iter().map(top).collect(),
        top: None,
    };
    Stack::open(files, true).unwrap()
}

/// 140 layers, each with its own few clusters, read as QEMU reads the chain's model.
#[test]
fn deep_stack_of_140_layers_reads_alike() {
    let Some(dir) = Dir::with_qemu() else { return };
    let size = 4 << 20;
    let mut model = vec![0_u8; size as usize];
    let mut table = Table::empty(size).unwrap();
    let mut layers = Vec::new();
    for i in 0..140_u64 {
        let name = format!("l{i}.qcow2");
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", &name, &size.to_string()]);
        let (start, len) = (i * 37 * KIB % (size - 64 * KIB), (i % 13 + 1) * KIB);
        let start = start / 4096 * 4096;
        dir.qemu_io(&name, &[format!("write -q -P {} {start} {}", i + 1, len.next_multiple_of(4096))]);
        let stop = start + len.next_multiple_of(4096);
        model[start as usize..stop as usize].fill((i + 1) as u8);
        let data = dir.file(&format!("data{i}"));
        let map = layer::convert(&dir.open(&name), Format::Qcow2, &data, &Limits::default(), &mut |_, _| {}).unwrap();
        table = table.overlay(&map).unwrap();
        layers.push(data);
    }
    let file = dir.file("table");
    table.write_to(&file).unwrap();
    let stack = Stack::open(StackFiles { table: file, layers, frozen: vec![], top: None }, true).unwrap();
    assert!(read_all(&stack) == model);
}

/// Leaves holes where whole blocks are zeros, so that a large image costs what it holds.
struct Sparse(File);

impl Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for block in bytes.chunks(4096) {
            if *block == [0; 4096][..block.len()] {
                self.0.seek(SeekFrom::Current(block.len() as i64))?;
            } else {
                self.0.write_all(block)?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk of several GiB with a write into most of its clusters: more than one L2 table (512 MiB each) and more than one
/// block of refcounts (2 GiB of file) go out, and QEMU finds them sound and the bytes where they were written.
#[test]
fn diff_beyond_one_refcount_block_is_sound_for_qemu() {
    const CLUSTER: u64 = 64 * KIB;
    let Some(dir) = Dir::with_qemu_on_tmpfs() else { return };
    let size = (3 << 30) + 5 * 512;
    dir.file("base.raw").set_len(size).unwrap();
    Top::create(&dir.file("top0.data"), &dir.file("top0.map"), size).unwrap();
    let stack = stack_of(&dir, &[("base.raw", Format::Raw)], Some("top0"));
    let model = dir.file("model.raw");
    model.set_len(size).unwrap();
    let write = |at: u64, bytes: &[u8]| {
        stack.write_at(at, bytes).unwrap();
        model.write_all_at(bytes, at).unwrap();
    };
    // Three of four clusters of the first 2.9 GiB, each somewhere else in its cluster; and the disk's last sector.
    let clusters = (0..46_000_u64).filter(|cluster| cluster % 4 != 3);
    let mut written = 0;
    for cluster in clusters {
        write(cluster * CLUSTER + cluster % 128 * 512, &[cluster as u8 | 1; 512]);
        written += 1;
    }
    write(size - 512, &[0xEE; 512]);
    stack.flush().unwrap();
    drop(stack);
    let stack = open_frozen(&dir, &["top0".into()]);

    let plan = Plan::diff(&stack).unwrap();
    let mut file = Sparse(dir.file("diff.qcow2"));
    plan.write_to(&mut file).unwrap();
    file.0.set_len(plan.file_size()).unwrap();

    let refcount_block = 2 << 30;
    assert!(written * CLUSTER > refcount_block && plan.file_size() > refcount_block + 7 * CLUSTER);
    assert!(file.0.metadata().unwrap().blocks() * 512 < 512 << 20, "the test fills the disk");
    dir.qemu_img(&["check", "-q", "-f", "qcow2", "diff.qcow2"]);
    dir.qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "diff.qcow2"]);
    dir.qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", "diff.qcow2", "model.raw"]);
}
