use std::{
    fs::{self, File},
    io::Read,
    path::Path,
    sync::Arc,
    thread,
};

use proptest::prelude::*;

use super::*;
use crate::{Stack, StackFiles, Table, TopFiles};

const SECTOR: u64 = crate::SECTOR;

fn file(dir: &Path, name: &str) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(dir.join(name)).unwrap()
}

/// A stack of one layer, full of `base`, and a fresh top; `size` bytes.
fn stack(dir: &Path, size: u64, base: u8) -> Stack {
    let layer = file(dir, "layer");
    let raw = vec![base; size as usize];
    let format = crate::layer::Format::Raw;
    let limits = crate::layer::Limits::default();
    let map = crate::layer::convert(&raw.as_slice(), format, &layer, &limits, &mut |_, _| {}).unwrap();
    Table::merge([&map]).unwrap().write_to(&file(dir, "table")).unwrap();
    new_top(dir, "top", size);
    open(dir, &["top"])
}

fn new_top(dir: &Path, name: &str, size: u64) -> TopFiles {
    let (data, map) = (file(dir, &format!("{name}.data")), file(dir, &format!("{name}.map")));
    Top::create(&data, &map, size).unwrap();
    TopFiles { data, map }
}

/// Opens what lies in the directory; the last top is the writable one.
fn open(dir: &Path, tops: &[&str]) -> Stack {
    let top = |n: &&str| TopFiles { data: file(dir, &format!("{n}.data")), map: file(dir, &format!("{n}.map")) };
    let mut frozen: Vec<_> = tops.iter().map(top).collect();
    let top = frozen.pop();
    Stack::open(StackFiles { table: file(dir, "table"), layers: vec![file(dir, "layer")], frozen, top }, false).unwrap()
}

fn read(stack: &Stack, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xEE; len];
    stack.read_at(offset, &mut buf).unwrap();
    buf
}

#[test]
fn partial_write_keeps_the_rest_of_the_block() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 64 << 10, 9);
    stack.write_at(4096 + 512, &[1; 1024]).unwrap();
    let got = read(&stack, 0, 12288);
    assert!(got[..4608].iter().all(|b| *b == 9) && got[5632..].iter().all(|b| *b == 9));
    assert!(got[4608..5632].iter().all(|b| *b == 1));
}

#[test]
fn write_after_write_zeroes_does_not_bring_old_data_back() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 64 << 10, 9);
    stack.write_at(0, &[1; 8192]).unwrap();
    stack.write_zeroes(0, 8192).unwrap();
    stack.write_at(512, &[2; 512]).unwrap();
    let got = read(&stack, 0, 8192);
    assert!(got[..512].iter().all(|b| *b == 0) && got[512..1024].iter().all(|b| *b == 2));
    assert!(got[1024..].iter().all(|b| *b == 0));
}

#[test]
fn discard_of_zeros_leaves_the_top_empty() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 1 << 20, 0);
    stack.discard(0, 1 << 20).unwrap();
    stack.flush().unwrap();
    let top = Top::open(file(dir.path(), "top.data"), file(dir.path(), "top.map")).unwrap();
    assert_eq!(top.run(0, 1 << 20).unwrap(), (State::Absent, 1 << 20));
}

#[test]
fn discard_frees_space_of_the_host() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 8 << 20, 0);
    stack.write_at(0, &vec![1; 4 << 20]).unwrap();
    stack.flush().unwrap();
    let blocks = || fs::metadata(dir.path().join("top.data")).unwrap().blocks() * 512;
    assert!(blocks() >= 4 << 20);
    stack.discard(0, 4 << 20).unwrap();
    assert!(blocks() < 1 << 20, "{} bytes are still allocated", blocks());
}

#[test]
fn request_unaligned_or_out_of_range_returns_its_error() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 64 << 10, 9);
    let mut buf = [0; 512];
    assert!(matches!(stack.read_at(100, &mut buf), Err(Error::Unaligned { offset: 100, len: 512 })));
    assert!(matches!(stack.write_at(0, &buf[..100]), Err(Error::Unaligned { .. })));
    assert!(matches!(stack.write_at(64 << 10, &buf), Err(Error::OutOfRange { size: 65536, .. })));
    assert!(matches!(stack.discard(u64::MAX - 511, 512), Err(Error::OutOfRange { .. })));
    assert!(matches!(stack.grow(4096), Err(Error::OutOfRange { .. })));
    assert!(matches!(stack.grow((64 << 10) + 1), Err(Error::Unaligned { .. })));
}

#[test]
fn read_only_stack_refuses_every_change() {
    let dir = tempfile::tempdir().unwrap();
    drop(stack(dir.path(), 64 << 10, 9));
    let files = StackFiles {
        table: file(dir.path(), "table"),
        layers: vec![File::open(dir.path().join("layer")).unwrap()],
        frozen: vec![],
        top: Some(TopFiles {
            data: File::open(dir.path().join("top.data")).unwrap(),
            map: File::open(dir.path().join("top.map")).unwrap(),
        }),
    };
    let stack = Stack::open(files, true).unwrap();
    assert!(stack.is_read_only());
    assert!(matches!(stack.write_at(0, &[0; 512]), Err(Error::ReadOnly)));
    assert!(matches!(stack.discard(0, 4096), Err(Error::ReadOnly)));
    assert!(matches!(stack.grow(1 << 20), Err(Error::ReadOnly)));
    assert_eq!(read(&stack, 0, 512), vec![9; 512]);
    stack.flush().unwrap();
}

#[test]
fn write_error_of_the_host_reaches_the_caller() {
    let dir = tempfile::tempdir().unwrap();
    drop(stack(dir.path(), 64 << 10, 9));
    let files = StackFiles {
        table: file(dir.path(), "table"),
        layers: vec![file(dir.path(), "layer")],
        frozen: vec![],
        // A data file that cannot be written, as on a full or failing disk.
        top: Some(TopFiles {
            data: File::open(dir.path().join("top.data")).unwrap(),
            map: file(dir.path(), "top.map"),
        }),
    };
    let stack = Stack::open(files, false).unwrap();
    let error = stack.write_at(0, &[1; 4096]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    assert_eq!(read(&stack, 0, 4096), vec![9; 4096]);
}

#[test]
fn frozen_top_never_changes_again() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 1 << 20, 9);
    stack.write_at(0, &[1; 65536]).unwrap();
    stack.freeze(new_top(dir.path(), "next", 1 << 20)).unwrap();
    let bytes = |name: &str| fs::read(dir.path().join(name)).unwrap();
    let before = (bytes("top.data"), bytes("top.map"));
    stack.write_at(0, &[2; 4096]).unwrap();
    stack.write_zeroes(8192, 8192).unwrap();
    stack.flush().unwrap();
    assert!(before == (bytes("top.data"), bytes("top.map")));
    drop(stack);
    let stack = open(dir.path(), &["top", "next"]);
    let got = read(&stack, 0, 20480);
    assert!(got[..4096].iter().all(|b| *b == 2) && got[4096..8192].iter().all(|b| *b == 1));
    assert!(got[8192..16384].iter().all(|b| *b == 0) && got[16384..].iter().all(|b| *b == 1));
}

#[test]
fn flush_after_push_makes_both_tops_durable() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 1 << 20, 9);
    stack.write_at(0, &[1; 8192]).unwrap();
    let next = stack.next_top(new_top(dir.path(), "next", 1 << 20)).unwrap();
    stack.push(next).unwrap();
    stack.write_at(4096, &[2; 4096]).unwrap();
    let durable = || read(&open(dir.path(), &["top", "next"]), 0, 8192);
    assert!(durable().iter().all(|b| *b == 9), "nothing has been flushed yet");
    stack.flush().unwrap();
    let got = durable();
    assert!(got[..4096].iter().all(|b| *b == 1) && got[4096..].iter().all(|b| *b == 2));
}

#[test]
fn flush_frozen_makes_the_old_top_durable_and_leaves_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 1 << 20, 9);
    stack.write_at(0, &[1; 8192]).unwrap();
    let next = stack.next_top(new_top(dir.path(), "next", 1 << 20)).unwrap();
    stack.push(next).unwrap();
    stack.write_at(4096, &[2; 4096]).unwrap();
    stack.flush_frozen().unwrap();
    assert!(read(&open(dir.path(), &["top"]), 0, 8192).iter().all(|b| *b == 1));
    let map = fs::read(dir.path().join("top.map")).unwrap();
    stack.write_at(0, &[3; 4096]).unwrap();
    stack.flush().unwrap();
    assert_eq!(fs::read(dir.path().join("top.map")).unwrap(), map, "a frozen top never changes again");
}

#[test]
fn frozen_top_that_cannot_be_flushed_ends_all_writes() {
    let dir = tempfile::tempdir().unwrap();
    drop(stack(dir.path(), 1 << 20, 9));
    let top = TopFiles {
        data: file(dir.path(), "top.data"),
        // A map that cannot be written, as on a full or failing disk.
        map: File::open(dir.path().join("top.map")).unwrap(),
    };
    let (table, layers) = (file(dir.path(), "table"), vec![file(dir.path(), "layer")]);
    let stack = Stack::open(StackFiles { table, layers, frozen: vec![], top: Some(top) }, false).unwrap();
    stack.write_at(0, &[1; 4096]).unwrap();
    let next = stack.next_top(new_top(dir.path(), "next", 1 << 20)).unwrap();
    stack.push(next).unwrap();
    stack.write_at(4096, &[2; 4096]).unwrap();
    assert!(stack.flush_frozen().is_err());
    assert!(matches!(stack.flush(), Err(Error::Poisoned)));
    assert!(matches!(stack.write_at(8192, &[3; 4096]), Err(Error::Poisoned)));
}

#[test]
fn freeze_with_a_top_of_another_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 1 << 20, 9);
    let error = stack.freeze(new_top(dir.path(), "next", 2 << 20)).unwrap_err();
    assert!(matches!(error, Error::BadFile { file: "new top", .. }));
    stack.write_at(0, &[1; 4096]).unwrap();
}

#[test]
fn map_with_many_chunks_is_kept_small_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let size = 48 << 30;
    Table::empty(size).unwrap().write_to(&file(dir.path(), "table")).unwrap();
    let top = Top::create(&file(dir.path(), "top.data"), &file(dir.path(), "top.map"), size);
    top.unwrap();
    let files = StackFiles {
        table: file(dir.path(), "table"),
        layers: vec![],
        frozen: vec![],
        top: Some(TopFiles { data: file(dir.path(), "top.data"), map: file(dir.path(), "top.map") }),
    };
    let stack = Stack::open(files, false).unwrap();
    let offsets: Vec<u64> = (0..700).map(|i| i * (64 << 20) + i * 4096).collect();
    for (i, offset) in offsets.iter().enumerate() {
        stack.write_at(*offset, &[(i % 250) as u8 + 1; 4096]).unwrap();
    }
    for (i, offset) in offsets.iter().enumerate() {
        assert_eq!(read(&stack, *offset, 4096)[0], (i % 250) as u8 + 1, "block {i}");
    }
    stack.with_view(|view| assert!(view.loaded_chunks() <= blocks::MAX_LOADED, "{}", view.loaded_chunks()));
}

#[test]
fn disk_larger_than_a_file_may_be_is_usable() {
    let dir = tempfile::tempdir().unwrap();
    // More than ext4 allows in a file.
    let size = 20 << 40;
    Table::empty(size).unwrap().write_to(&file(dir.path(), "table")).unwrap();
    let top = new_top(dir.path(), "top", size);
    let files = StackFiles { table: file(dir.path(), "table"), layers: vec![], frozen: vec![], top: Some(top) };
    let stack = Stack::open(files, false).unwrap();
    stack.write_at(1 << 40, &[5; 4096]).unwrap();
    assert_eq!(read(&stack, 1 << 40, 4096), vec![5; 4096]);
    assert_eq!(read(&stack, size - 4096, 4096), vec![0; 4096]);
    stack.grow(size + 512).unwrap();
    assert_eq!(read(&stack, size, 512), vec![0; 512]);
}

#[test]
fn damaged_map_returns_bad_file() {
    let dir = tempfile::tempdir().unwrap();
    drop(stack(dir.path(), 1 << 20, 9));
    let path = dir.path().join("top.map");
    let good = fs::read(&path).unwrap();
    for (offset, value) in [(0, 0xff), (8, 9), (12, 1), (16, 1), (60, 1)] {
        let mut bad = good.clone();
        bad[offset] ^= value;
        fs::write(&path, bad).unwrap();
        let result = Top::open(file(dir.path(), "top.data"), file(dir.path(), "top.map"));
        assert!(matches!(result, Err(Error::BadFile { .. })), "byte {offset}");
    }
    let mut bad = good.clone();
    bad[4096] = 0b11;
    fs::write(&path, bad).unwrap();
    let top = Top::open(file(dir.path(), "top.data"), file(dir.path(), "top.map")).unwrap();
    assert!(matches!(top.run(0, 4096), Err(Error::BadFile { .. })));
    fs::write(&path, good).unwrap();
    file(dir.path(), "top.data").set_len(4096).unwrap();
    let result = Top::open(file(dir.path(), "top.data"), file(dir.path(), "top.map"));
    assert!(matches!(result, Err(Error::BadFile { file: "top's data file", .. })));
}

/// Threads write sectors that share blocks, while others discard, flush and freeze: no write may get lost.
#[test]
fn concurrent_partial_writes_of_one_block_all_survive() {
    const THREADS: u64 = 4;
    const SIZE: u64 = 256 << 10;
    for round in 0..20_u8 {
        let dir = tempfile::tempdir().unwrap();
        let stack = Arc::new(stack(dir.path(), SIZE, 200));
        thread::scope(|scope| {
            for t in 0..THREADS {
                let stack = Arc::clone(&stack);
                scope.spawn(move || {
                    for sector in (t..SIZE / SECTOR).step_by(THREADS as usize) {
                        let value = (sector % 100) as u8 + 1;
                        stack.write_at(sector * SECTOR, &[value; SECTOR as usize]).unwrap();
                        if sector % 97 == u64::from(round) {
                            stack.flush().unwrap();
                        }
                    }
                });
            }
            let stack = Arc::clone(&stack);
            let next = new_top(dir.path(), "next", SIZE);
            scope.spawn(move || stack.freeze(next).unwrap());
        });
        stack.flush().unwrap();
        drop(stack);
        let got = read(&open(dir.path(), &["top", "next"]), 0, SIZE as usize);
        for (sector, bytes) in got.chunks(SECTOR as usize).enumerate() {
            let value = (sector % 100) as u8 + 1;
            assert!(bytes.iter().all(|b| *b == value), "sector {sector} of round {round}: {}", bytes[0]);
        }
    }
}

thread_local! {
    /// Makes this thread slow between reading a chunk and keeping it.
    static SLOW: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

pub(super) fn after_load() {
    if SLOW.get() {
        thread::sleep(std::time::Duration::from_millis(3));
    }
}

/// Many more chunks than are kept loaded, changed by all threads at once while they are flushed and dropped.
#[test]
fn chunks_that_come_and_go_lose_no_write() {
    const CHUNK: u64 = 64 << 20;
    const CHUNKS: u64 = 24;
    let dir = tempfile::tempdir().unwrap();
    let size = CHUNKS * CHUNK;
    Table::empty(size).unwrap().write_to(&file(dir.path(), "table")).unwrap();
    let top = Some(new_top(dir.path(), "top", size));
    let files = StackFiles { table: file(dir.path(), "table"), layers: vec![], frozen: vec![], top };
    let stack = Stack::open(files, false).unwrap();
    let place = |t: u64, i: u64| (i * 7 + t) % CHUNKS * CHUNK + (t * 400 + i) * 4096;
    thread::scope(|scope| {
        for t in 0..4 {
            let stack = &stack;
            scope.spawn(move || {
                SLOW.set(t == 0);
                for i in 0..400 {
                    stack.write_at(place(t, i), &[t as u8 + 1; 4096]).unwrap();
                    if i % 5 == t {
                        stack.flush().unwrap();
                    }
                    let before = i.saturating_sub(17);
                    assert_eq!(read(stack, place(t, before), 512), vec![t as u8 + 1; 512], "{t} {before}");
                }
            });
        }
    });
    for (t, i) in (0..4).flat_map(|t| (0..400).map(move |i| (t, i))) {
        assert_eq!(read(&stack, place(t, i), 4096), vec![t as u8 + 1; 4096], "{t} {i}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

const SECTORS: u64 = 1024;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..SECTORS, prop_oneof![1..16_u64, 1..300_u64]).prop_map(|(o, l)| (o, l.min(SECTORS - o)));
    let step = prop_oneof![
        6 => (range.clone(), 1..=250_u8).prop_map(|((o, l), p)| Step::Write(o, l, p)),
        2 => range.clone().prop_map(|(o, l)| Step::Zero(o, l)),
        1 => range.prop_map(|(o, l)| Step::Discard(o, l)),
        2 => Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..30)
}

/// Each 512-byte piece from one or the other file.
fn torn(old: &[u8], new: &[u8], seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut mixed = Vec::with_capacity(new.len());
    for (old, new) in old.chunks(512).zip(new.chunks(512)) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        mixed.extend_from_slice(if state & 4 == 0 { old } else { new });
    }
    mixed
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// At a power cut during the last flush, each sector reads as it was at the flush before, or as a later write left it,
    /// whichever sectors of the files had reached the medium.
    #[test]
    fn crash_at_any_point_keeps_what_was_flushed(trace in steps(), seed in any::<u64>(), map_began in any::<bool>()) {
        const BASE: u8 = 251;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let stack = stack(path, SECTORS * SECTOR, BASE);
        let bytes = |name: &str| fs::read(path.join(name)).unwrap();
        let mut flushed = (bytes("top.data"), bytes("top.map"));
        let mut allowed: Vec<Vec<u8>> = vec![vec![BASE]; SECTORS as usize];
        for step in &trace {
            let (range, value) = match step {
                Step::Write(o, l, p) => {
                    stack.write_at(o * SECTOR, &vec![*p; (l * SECTOR) as usize]).unwrap();
                    (*o..o + l, *p)
                }
                Step::Zero(o, l) => {
                    stack.write_zeroes(o * SECTOR, l * SECTOR).unwrap();
                    (*o..o + l, 0)
                }
                Step::Discard(o, l) => {
                    stack.discard(o * SECTOR, l * SECTOR).unwrap();
                    (o.next_multiple_of(8)..(o + l) / 8 * 8, 0)
                }
                Step::Flush => {
                    stack.flush().unwrap();
                    flushed = (bytes("top.data"), bytes("top.map"));
                    allowed.iter_mut().for_each(|values| *values = values.split_off(values.len() - 1));
                    continue;
                }
            };
            for sector in range {
                allowed[sector as usize].push(value);
            }
        }
        let data = bytes("top.data");
        let data = if map_began { data } else { torn(&flushed.0, &data, seed) };
        let map = if map_began {
            stack.flush().unwrap();
            torn(&flushed.1, &bytes("top.map"), seed)
        } else {
            flushed.1
        };
        drop(stack);
        fs::write(path.join("top.data"), data).unwrap();
        fs::write(path.join("top.map"), map).unwrap();
        let got = read(&open(path, &["top"]), 0, (SECTORS * SECTOR) as usize);
        for (sector, (bytes, values)) in got.chunks(SECTOR as usize).zip(&allowed).enumerate() {
            let whole = bytes.iter().all(|b| *b == bytes[0]);
            prop_assert!(whole && values.contains(&bytes[0]), "sector {sector} is {}, not of {values:?}", bytes[0]);
        }
    }
}

#[test]
fn to_layer_map_makes_the_data_file_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    let stack = stack(dir.path(), 1 << 20, 9);
    stack.write_at(65536, &[1; 8192]).unwrap();
    stack.write_zeroes(0, 4096).unwrap();
    stack.flush().unwrap();
    let top = Top::open(file(dir.path(), "top.data"), file(dir.path(), "top.map")).unwrap();
    let states: Vec<_> = top.to_layer_map().unwrap().extents().map(|e| (e.start, e.len, e.state)).collect();
    let want = [
        (0, 4096, State::Zero),
        (4096, 61440, State::Absent),
        (65536, 8192, State::Data),
        (73728, (1 << 20) - 73728, State::Absent),
    ];
    assert_eq!(states, want);
    let mut bytes = Vec::new();
    file(dir.path(), "top.data").read_to_end(&mut bytes).unwrap();
    assert!(bytes[65536..73728].iter().all(|b| *b == 1));
}
