//! A temporary directory with QEMU's tools in it, and stacks made there.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::{
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    process::Command,
};

use ovms_disk::{
    layer::{self, Format, Limits},
    Stack, StackFiles, Table, TopFiles,
};

/// How many cases a property gets: `PROPTEST_CASES` or `default`.
pub fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Dir {
        Dir(tempfile::tempdir().unwrap())
    }

    /// `None`, with a loud word, where there is no `qemu-img`.
    pub fn with_qemu() -> Option<Dir> {
        Self::with_qemu_below(&std::env::temp_dir())
    }

    /// The same on tmpfs, where there is one: for files whose thousands of extents a disk takes minutes to write.
    pub fn with_qemu_on_tmpfs() -> Option<Dir> {
        let shm = Path::new("/dev/shm");
        Self::with_qemu_below(if shm.is_dir() { shm } else { Path::new("/tmp") })
    }

    fn with_qemu_below(parent: &Path) -> Option<Dir> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("SKIPPED: qemu-img is not installed (Debian: qemu-utils), nothing was compared");
            return None;
        }
        let dir = Dir(tempfile::tempdir_in(parent).unwrap());
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..200_000)
            .map(|i| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // Six random bits in a byte: zlib and zstd save a little. Every eighth 4 KiB they save nearly all.
                if i / 4096 % 8 == 7 {
                    1
                } else {
                    (state >> 58) as u8
                }
            })
            .collect();
        dir.write("noise", &noise);
        Some(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A new, empty file.
    pub fn file(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(self.path(name)).unwrap()
    }

    /// A file as it is, for reading and writing.
    pub fn open(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap()
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        name.to_owned()
    }

    pub fn qemu_img(&self, args: &[&str]) {
        self.run("qemu-img", args);
    }

    pub fn qemu_io(&self, image: &str, commands: &[String]) {
        let mut args = vec!["-d", "unmap", "-f", "qcow2"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(image);
        self.run("qemu-io", &args);
    }

    fn run(&self, program: &str, args: &[&str]) {
        let out = Command::new(program).args(args).current_dir(self.0.path()).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && !text.contains("failed"), "{program} {args:?}: {text}");
    }
}

/// Converts the layers, base first, and opens them with the top of that name.
pub fn stack_of(dir: &Dir, layers: &[(&str, Format)], top: Option<&str>) -> Stack {
    let mut maps = Vec::new();
    let mut files = Vec::new();
    for (i, (name, format)) in layers.iter().enumerate() {
        let data = dir.file(&format!("layer{i}"));
        let map = layer::convert(&dir.open(name), *format, &data, &Limits::default(), &mut |_, _| {}).unwrap();
        // Through its file, as the map of a layer always goes.
        let file = dir.file(&format!("map{i}"));
        map.write_to(&file).unwrap();
        maps.push(ovms_disk::LayerMap::read_from(&file).unwrap());
        files.push(data);
    }
    let table = dir.file("table");
    Table::merge(&maps).unwrap().write_to(&table).unwrap();
    let top = top.map(|n| TopFiles { data: dir.open(&format!("{n}.data")), map: dir.open(&format!("{n}.map")) });
    Stack::open(StackFiles { table, layers: files, frozen: vec![], top }, false).unwrap()
}

/// The whole disk, read in odd pieces.
pub fn read_all(stack: &Stack) -> Vec<u8> {
    let mut all = vec![0xEE_u8; stack.size() as usize];
    let mut offset = 0;
    for (i, piece) in all.chunks_mut(512 * 37).enumerate() {
        if i % 3 == 0 {
            let (a, b) = piece.split_at_mut(piece.len() / 3);
            stack.readv_at(offset, &mut [std::io::IoSliceMut::new(a), std::io::IoSliceMut::new(b)]).unwrap();
        } else {
            stack.read_at(offset, piece).unwrap();
        }
        offset += piece.len() as u64;
    }
    all
}
