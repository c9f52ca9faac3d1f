use super::*;

use std::io::Write;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

const MIB: u64 = 1 << 20;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn payload(kernel: &[u8]) -> Payload {
    Payload { kernel: file(kernel), initrd: None, cmdline: "console=ttyS0".into() }
}

fn sparse(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// A bzImage header with a protected-mode kernel of `body` behind one setup sector.
fn bzimage(body: &[u8], init_size: u32) -> Vec<u8> {
    let mut image = vec![0u8; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &(16 * MIB).to_le_bytes());
    put(0x260, &init_size.to_le_bytes());
    image.extend_from_slice(body);
    image
}

/// An ELF file with one segment at `address` and, if asked for, a PVH note that points to `pvh`.
fn elf(address: u64, memory_size: u64, entry: u64, pvh: Option<u32>) -> Vec<u8> {
    let code = [0xf4u8; 16];
    let note: Vec<u8> = pvh
        .map(|entry| {
            let words = [4u32, 4, 18].map(u32::to_le_bytes).concat();
            [words, b"Xen\0".to_vec(), entry.to_le_bytes().to_vec()].concat()
        })
        .unwrap_or_default();
    let headers = if pvh.is_some() { 2u16 } else { 1 };
    let data = 64 + 56 * u64::from(headers);
    let mut image = vec![0u8; 64];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[16..18].copy_from_slice(&2u16.to_le_bytes());
    image[18..20].copy_from_slice(&62u16.to_le_bytes());
    image[24..32].copy_from_slice(&entry.to_le_bytes());
    image[32..40].copy_from_slice(&64u64.to_le_bytes());
    image[54..56].copy_from_slice(&56u16.to_le_bytes());
    image[56..58].copy_from_slice(&headers.to_le_bytes());
    let segment = |kind: u32, offset: u64, address: u64, in_file: u64, in_memory: u64| {
        let numbers = [offset, address, address, in_file, in_memory, 4].map(u64::to_le_bytes).concat();
        [kind.to_le_bytes().to_vec(), 7u32.to_le_bytes().to_vec(), numbers].concat()
    };
    image.extend(segment(1, data, address, code.len() as u64, memory_size));
    if pvh.is_some() {
        image.extend(segment(4, data + 16, 0, note.len() as u64, note.len() as u64));
    }
    image.extend(code);
    image.extend(note);
    image
}

fn refused(ram: &Ram, payload: Payload) -> String {
    load(ram, payload, 0xe_0000).unwrap_err().to_string()
}

#[test]
fn bzimage_lands_at_1_mib_and_the_zero_page_says_where_things_are() {
    let ram = Ram::map(128 * MIB).unwrap();
    let mut payload = payload(&bzimage(&[0x5a; 4096], 32 << 20));
    payload.initrd = Some(file(b"initial ram disk"));
    assert_eq!(load(&ram, payload, 0xe_0000).unwrap(), Entry::Linux64(0x10_0200));
    let memory = ram.memory();
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x10_0000)).unwrap(), 0x5a5a_5a5a);
    let zero_page = |at: u64| memory.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + at)).unwrap();
    let (address, size) = (zero_page(0x218), zero_page(0x21c));
    assert_eq!(size, 16);
    assert_eq!(u64::from(address), 128 * MIB - 4096);
    let mut start = [0u8; 16];
    memory.read_slice(&mut start, GuestAddress(address.into())).unwrap();
    assert_eq!(&start, b"initial ram disk");
    assert_eq!(zero_page(0x228), layout::CMDLINE as u32);
    assert_eq!(zero_page(0x070), 0xe_0000);
    assert_eq!(zero_page(0x1e8) & 0xff, 4);
    let mut cmdline = [0u8; 14];
    memory.read_slice(&mut cmdline, GuestAddress(layout::CMDLINE)).unwrap();
    assert_eq!(&cmdline, b"console=ttyS0\0");
}

#[test]
fn bzimage_larger_than_memory_returns_kernel_fit() {
    let ram = Ram::map(32 * MIB).unwrap();
    let message = refused(&ram, payload(&bzimage(&[0; 64], 60 << 20)));
    assert_eq!(message, "the kernel needs 76 MiB of memory, the machine has 32 MiB: raise --memory");
    let huge = payload(&bzimage(&[0; 64], 1 << 20));
    huge.kernel.set_len(64 * MIB).unwrap();
    assert!(refused(&ram, huge).starts_with("the kernel needs 65 MiB"));
}

#[test]
fn bzimage_without_64_bit_entry_returns_protocol() {
    let ram = Ram::map(64 * MIB).unwrap();
    let mut image = bzimage(&[0; 64], 1 << 20);
    image[0x236] = 0;
    assert!(refused(&ram, payload(&image)).contains("boot protocol 2.15 without a 64-bit entry"));
}

#[test]
fn command_line_longer_than_the_kernel_takes_returns_cmdline_length() {
    let ram = Ram::map(64 * MIB).unwrap();
    let mut image = bzimage(&[0; 64], 1 << 20);
    image[0x238..0x23c].copy_from_slice(&5u32.to_le_bytes());
    assert_eq!(refused(&ram, payload(&image)), "the kernel command line has 13 bytes, this kernel takes 5");
}

#[test]
fn initrd_between_kernel_and_top_is_placed_or_refused_with_sizes() {
    let ram = Ram::map(64 * MIB).unwrap();
    let mut fits = payload(&bzimage(&[0; 64], 16 << 20));
    fits.initrd = Some(sparse(32 * MIB));
    load(&ram, fits, 0).unwrap();
    let mut too_large = payload(&bzimage(&[0; 64], 16 << 20));
    too_large.initrd = Some(sparse(32 * MIB + 1));
    let message = refused(&ram, too_large);
    assert_eq!(
        message,
        "the initrd (33 MiB) does not fit behind the kernel (to 32 MiB) into 64 MiB of memory: raise --memory"
    );
}

#[test]
fn initrd_stays_below_the_address_that_the_kernel_names() {
    let ram = Ram::map(128 * MIB).unwrap();
    let mut image = bzimage(&[0; 64], 1 << 20);
    image[0x22c..0x230].copy_from_slice(&(100 * MIB as u32 - 1).to_le_bytes());
    let mut payload = payload(&image);
    payload.initrd = Some(sparse(MIB));
    load(&ram, payload, 0).unwrap();
    let address: u32 = ram.memory().read_obj(GuestAddress(layout::ZERO_PAGE + 0x218)).unwrap();
    assert_eq!(u64::from(address), 99 * MIB);
}

#[test]
fn elf_with_note_boots_by_pvh_and_without_by_its_entry() {
    let ram = Ram::map(64 * MIB).unwrap();
    let with = elf(MIB, 8192, MIB + 8, Some(0x10_0004));
    assert_eq!(load(&ram, payload(&with), 0xe_0000).unwrap(), Entry::Pvh(0x10_0004));
    let info = |at| ram.memory().read_obj::<u64>(GuestAddress(layout::PVH_START_INFO + at)).unwrap();
    assert_eq!((info(0) as u32, info(24), info(32)), (0x336e_c578, layout::CMDLINE, 0xe_0000));
    let without = elf(MIB, 8192, MIB + 8, None);
    assert_eq!(load(&ram, payload(&without), 0).unwrap(), Entry::Linux64(MIB + 8));
}

#[test]
fn elf_segments_outside_of_memory_are_refused() {
    let ram = Ram::map(32 * MIB).unwrap();
    let low = elf(0x7000, 4096, 0x7000, None);
    assert!(refused(&ram, payload(&low)).contains("0x7000, below 1 MiB"));
    let high = elf(31 * MIB, 2 * MIB, 31 * MIB, None);
    assert!(refused(&ram, payload(&high)).starts_with("the kernel needs 33 MiB of memory, the machine has 32 MiB"));
    let wrapping = elf(u64::MAX - 8, 4096, MIB, None);
    assert!(refused(&ram, payload(&wrapping)).contains("raise --memory"));
    let astray = elf(MIB, 4096, 16 * MIB, None);
    assert!(refused(&ram, payload(&astray)).contains("entry point"));
}

#[test]
fn damaged_headers_never_panic_and_never_boot_low() {
    let ram = Ram::map(32 * MIB).unwrap();
    let images = [elf(MIB, 8192, MIB + 8, Some(0x10_0004)), bzimage(&[0x90; 512], 1 << 20)];
    for image in images {
        for at in 0..image.len().min(0x270) {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = image.clone();
                damaged[at] = value;
                // Whatever comes of it: an entry inside memory, or an error.
                match load(&ram, payload(&damaged), 0) {
                    Ok(Entry::Pvh(address)) => assert!(u64::from(address) >= layout::HIGH_MEMORY),
                    Ok(Entry::Linux64(address)) => assert!(address >= layout::HIGH_MEMORY),
                    Err(_) => {}
                }
            }
        }
        for length in (0..image.len()).step_by(7) {
            let _ = load(&ram, payload(&image[..length]), 0);
        }
    }
}

#[test]
fn memory_map_covers_all_memory_once() {
    for size in [32 * MIB, 3 << 30, 5 << 30] {
        let ram = Ram::map(size).unwrap();
        let map = memory_map(&ram);
        assert!(map.windows(2).all(|pair| pair[0].start + pair[0].size <= pair[1].start), "{map:?}");
        let lost = layout::HIGH_MEMORY - layout::CONVENTIONAL_END;
        let usable: u64 = map.iter().filter(|range| range.kind == RangeKind::Ram).map(|range| range.size).sum();
        assert_eq!(usable, size - lost);
        let backed = ram.memory().iter().map(|region| region.len()).sum::<u64>();
        assert_eq!(backed, size);
    }
}
