//! The safe `.pt` reader: every type and view, and files that are broken or hostile.

mod pt;

use std::alloc::{GlobalAlloc, Layout, System};
use std::borrow::Cow;
use std::cell::Cell;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use decdec::source::torch::{TorchFile, Value};
use half::{bf16, f16};
use pt::{Array, End, Entry, Node, archive, int, ints, save, storage_id, tensor, text};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Beyond its map, no file costs more than this.
const MEMORY_CAP: isize = 64 << 20;

/// Counts what this thread holds, and the most that it ever held.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    HELD.set(HELD.get() + bytes);
    PEAK.set(PEAK.get().max(HELD.get()));
}

// SAFETY: every call is passed on to the system's allocator as it came; the counters never allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens `bytes` as a file; `Err` holds the whole message.
fn open(bytes: &[u8]) -> Result<TorchFile, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    TorchFile::open(file.path()).map_err(|error| format!("{error:#}"))
}

/// An archive of `pickle` (without its STOP) and `data/0`, whose 16 bytes are 4 numbers of 32 bits.
fn with_pickle(pickle: impl AsRef<[u8]>) -> Vec<u8> {
    let numbers = [1.0f32, 2.0, 3.0, 4.0].map(f32::to_le_bytes).concat();
    let pickle = [b"\x80\x02", pickle.as_ref(), b"."].concat();
    archive(&[Entry::new("a/data.pkl", pickle), Entry::new("a/data/0", numbers)], &End::default(), 0)
}

/// A small file with everything in it.
fn sample() -> Vec<u8> {
    let storage = storage_id("FloatStorage", "0", 4);
    let rows = tensor(&storage, 0, &[2, 2], &[2, 1]);
    let columns = tensor(&storage, 0, &[2, 2], &[1, 2]);
    with_pickle(
        [
            b"}q\x00(".as_slice(),
            &text("rows"),
            &rows,
            &text("columns"),
            &columns,
            &text("list"),
            b"](NK\x07M\x01\x02J\xff\xff\xff\xff\x8a\x01\xfeG\x3f\xf8\0\0\0\0\0\0\x88e",
            b"u",
        ]
        .concat(),
    )
}

/// Reads all that a file holds.
fn read_all(value: Value<'_>, depth: usize) {
    if let Ok(tensor) = value.tensor() {
        let _ = (tensor.floats(), tensor.words(), tensor.integers());
    }
    if depth == 0 {
        return;
    }
    value.entries().into_iter().flatten().for_each(|(_, value)| read_all(value, depth - 1));
    value.items().into_iter().flatten().for_each(|value| read_all(value, depth - 1));
}

#[test]
fn views_and_values() {
    let file = open(&sample()).unwrap();
    let entries = file.root().entries().unwrap();
    assert_eq!(entries.keys().collect::<Vec<_>>(), [&"columns", &"list", &"rows"]);
    // Two views of one storage, one of them transposed.
    let floats = |name| entries[name].tensor().unwrap().floats().unwrap().to_f32().into_owned();
    assert_eq!(floats("rows"), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(floats("columns"), [1.0, 3.0, 2.0, 4.0]);
    assert_eq!(entries["rows"].tensor().unwrap().shape(), [2, 2]);
    let list: Vec<_> = entries["list"].items().unwrap().map(Value::number).collect();
    assert_eq!(list, [None, Some(7.0), Some(513.0), Some(-1.0), Some(-2.0), Some(1.5), Some(1.0)]);
    let bytes = [4i32, 5, 6, 7, 8, 9].map(i32::to_le_bytes).concat();
    let tensor = Node::Tensor(Array { storage: "IntStorage", shape: vec![3, 2], bytes });
    let saved = open(&save(&Node::List(vec![Node::Dict(vec![("k".into(), tensor)])]))).unwrap();
    let layer = saved.root().items().unwrap().next().unwrap().entries().unwrap();
    assert_eq!(layer["k"].tensor().unwrap().integers().unwrap(), [4, 5, 6, 7, 8, 9]);
}

/// One tensor of `storage` whose numbers have these bytes, `skew` bytes from a multiple of 64.
fn numbers(storage: &str, len: usize, bytes: &[u8], skew: usize) -> TorchFile {
    let pickle = tensor(&storage_id(storage, "0", len as i64), 0, &[len as i64], &[1]);
    let pickle = [b"\x80\x02".as_slice(), &pickle, b"."].concat();
    open(&archive(&[Entry::new("a/data.pkl", pickle), Entry::new("a/data/0", bytes)], &End::default(), skew)).unwrap()
}

#[test]
fn every_type() {
    // Storages that start at an odd byte are copied, others borrowed: the numbers are the same.
    for skew in [0, 1] {
        let floats = |storage, bytes: &[u8]| {
            let file = numbers(storage, 2, bytes, skew);
            file.root().tensor().unwrap().floats().unwrap().to_f32().into_owned()
        };
        assert_eq!(floats("HalfStorage", &[1.5, -2.0].map(|x| f16::from_f32(x).to_le_bytes()).concat()), [1.5, -2.0]);
        assert_eq!(
            floats("BFloat16Storage", &[1.5, -2.0].map(|x| bf16::from_f32(x).to_le_bytes()).concat()),
            [1.5, -2.0]
        );
        assert_eq!(floats("FloatStorage", &[1.5f32, -2.0].map(f32::to_le_bytes).concat()), [1.5, -2.0]);
        assert_eq!(floats("DoubleStorage", &[1.5f64, -2.0].map(f64::to_le_bytes).concat()), [1.5, -2.0]);
        let integers =
            |storage, bytes: &[u8]| numbers(storage, 2, bytes, skew).root().tensor().unwrap().integers().unwrap();
        assert_eq!(integers("LongStorage", &[i64::MIN, 7].map(i64::to_le_bytes).concat()), [i64::MIN, 7]);
        assert_eq!(integers("IntStorage", &[-3i32, 7].map(i32::to_le_bytes).concat()), [-3, 7]);
        assert_eq!(integers("ShortStorage", &[-3i16, 7].map(i16::to_le_bytes).concat()), [-3, 7]);
        assert_eq!(integers("CharStorage", &[0xfd, 7]), [-3, 7]);
        assert_eq!(integers("ByteStorage", &[0xfd, 7]), [253, 7]);
        assert_eq!(integers("BoolStorage", &[0, 2]), [0, 1]);
        let words = numbers("IntStorage", 2, &[-3i32, 7].map(i32::to_le_bytes).concat(), skew);
        assert_eq!(*words.root().tensor().unwrap().words().unwrap(), [u32::MAX - 2, 7]);
        let borrowed = matches!(words.root().tensor().unwrap().words().unwrap(), Cow::Borrowed(_));
        assert_eq!(borrowed, skew == 0);
        let refused = words.root().tensor().unwrap().floats().unwrap_err().to_string();
        assert_eq!(refused, "a tensor of i32, floating-point numbers are expected");
    }
}

#[test]
fn other_protocols_and_zip64() {
    let storage = storage_id("FloatStorage", "0", 4);
    let parameter = [b"ctorch._utils\n_rebuild_parameter\n(".as_slice(), &tensor(&storage, 1, &[3], &[1]), b"\x88NtR"];
    // Protocol 4: FRAME, SHORT_BINUNICODE, MEMOIZE, STACK_GLOBAL, then state for an OrderedDict.
    let ordered = b"\x95\x04\0\0\0\0\0\0\0\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x93)R\x8c\x01p";
    let state = [b"}".as_slice(), &text("_metadata"), b"h\x00sb"].concat();
    let pickle = [b"\x80\x04".as_slice(), ordered, &parameter.concat(), b"s", &state, b"."].concat();
    let numbers = [1.0f32, 2.0, 3.0, 4.0].map(f32::to_le_bytes).concat();
    let entries = [Entry::new("a/data.pkl", pickle), Entry::new("a/data/0", numbers)];
    let file = open(&archive(&entries, &End { wide: true, ..End::default() }, 0)).unwrap();
    let tensor = file.root().entries().unwrap()["p"].tensor().unwrap();
    assert_eq!(*tensor.floats().unwrap().to_f32(), [2.0, 3.0, 4.0]);
}

#[test]
fn beyond_four_gigabytes() {
    // A sparse file: a first storage of 4.5 GiB of zeros, then one that only 64-bit offsets reach.
    const LEN: u64 = 9 << 29;
    let big = tensor(&storage_id("FloatStorage", "0", (LEN / 4) as i64), 0, &[(LEN / 4) as i64], &[1]);
    let small = tensor(&storage_id("FloatStorage", "1", 2), 0, &[2], &[1]);
    let pickle = [b"\x80\x02](".as_slice(), &big, &small, b"e."].concat();
    let mut first = Entry::new("a/data/0", []);
    (first.size, first.stored, first.offset) = (Some(LEN), Some(LEN), Some(0));
    let head = archive(&[Entry::new("a/data/0", [])], &End::default(), 0);
    let head = &head[..64];
    let second = Entry::new("a/data/1", [5.0f32, 6.0].map(f32::to_le_bytes).concat());
    let mut rest = [second, Entry::new("a/data.pkl", pickle)];
    // The tail is made as an archive of its own, then told where it lies.
    let base = 64 + LEN;
    let bare = archive(&rest, &End::default(), 0);
    let data_len = bare.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let second_header = bare.windows(4).enumerate().filter(|(_, w)| w == b"PK\x03\x04").map(|(i, _)| i as u64);
    for (entry, offset) in rest.iter_mut().zip(second_header.collect::<Vec<_>>()) {
        entry.offset = Some(base + offset);
    }
    let directory = base + data_len as u64;
    let all = [first, rest[0].clone(), rest[1].clone()];
    let end = End { wide: true, directory: Some(directory), ..End::default() };
    let with_directory = archive(&all, &end, 0);
    let start = with_directory.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let record = with_directory.windows(4).position(|w| w == b"PK\x06\x06").unwrap() - start;
    let end = End { record: Some(directory + record as u64), ..end };
    let with_directory = archive(&all, &end, 0);

    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut write = |at: u64, bytes: &[u8]| {
        let file: &mut File = file.as_file_mut();
        file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(bytes)).unwrap();
    };
    write(0, head);
    write(base - 4, &9.0f32.to_le_bytes());
    write(base, &bare[..data_len]);
    write(directory, &with_directory[start..]);
    let torch = TorchFile::open(file.path()).unwrap();
    let mut items = torch.root().items().unwrap();
    let big = items.next().unwrap().tensor().unwrap().floats().unwrap();
    assert_eq!((big.len() as u64, big.get(big.len() - 1), big.get(1 << 30)), (LEN / 4, 9.0, 0.0));
    let small = items.next().unwrap().tensor().unwrap().floats().unwrap();
    assert_eq!(*small.to_f32(), [5.0, 6.0]);
}

/// A table of broken archives: what is wrong, the file, and what the error says.
fn broken_archives() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let pickle = || Entry::new("a/data.pkl", *b"\x80\x02N.");
    let data = || Entry::new("a/data/0", [7; 64]);
    let make = |entries: &[Entry], end: End| archive(entries, &end, 0);
    let with = |change: fn(&mut Entry)| {
        let mut entry = data();
        change(&mut entry);
        make(&[pickle(), entry], End::default())
    };
    let wide = |change: fn(&mut Entry)| {
        let mut entry = data();
        change(&mut entry);
        make(&[pickle(), entry], End { wide: true, ..End::default() })
    };
    let end = |end: End| make(&[pickle(), data()], end);
    let sound = end(End::default());
    let cut = |len: usize| sound[..len].to_vec();
    let mut named = sound.clone();
    let name = named.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    named[name + 28] = 0xff;
    let mut unsigned = sound.clone();
    unsigned[name] = b'X';
    let mut local = sound.clone();
    local[sound.windows(4).rposition(|w| w == b"PK\x03\x04").unwrap()] = b'X';
    vec![
        ("empty", Vec::new(), "not a zip archive"),
        ("the format before 1.6", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), "save the file again"),
        ("four bytes", cut(4), "is the file truncated?"),
        ("no end record", cut(sound.len() - 22), "no end of the directory found"),
        ("half an end record", cut(sound.len() - 9), "no end of the directory found"),
        ("more entries than there are", end(End { entries: Some(9), ..End::default() }), "directory entry"),
        (
            "2^60 entries",
            end(End { entries: Some(1 << 60), wide: true, ..End::default() }),
            "1152921504606846976 entries",
        ),
        ("a directory beyond the end", end(End { directory: Some(1 << 31), ..End::default() }), "does not end before"),
        (
            "a directory whose end overflows",
            end(End { directory: Some(u64::MAX - 3), wide: true, ..End::default() }),
            "does not end before",
        ),
        (
            "a zip64 record beyond the end",
            end(End { record: Some(u64::MAX), wide: true, ..End::default() }),
            "zip64 end record",
        ),
        ("a zip64 record elsewhere", end(End { record: Some(0), wide: true, ..End::default() }), "zip64 end record"),
        ("no zip64 field", end(End { wide: true, without_extra: true, ..End::default() }), "zip64 field is missing"),
        ("a name longer than the file", named, "is truncated"),
        ("no directory entry", unsigned, "a directory entry (0x02014b50) is expected"),
        ("no local header", local, "a local header (0x04034b50) is expected"),
        ("a name that is not UTF-8", with(|e| e.name[0] = 0xff), "not UTF-8"),
        ("encrypted", with(|e| e.flags = 1), "is encrypted"),
        ("compressed, as a zip bomb is", with(|e| (e.method, e.size) = (8, Some(1 << 31))), "is compressed (method 8)"),
        ("a size that is not stored", with(|e| e.size = Some(1 << 31)), "is stored in 64 bytes"),
        (
            "a size beyond the file",
            with(|e| (e.size, e.stored) = (Some(1 << 31), Some(1 << 31))),
            "runs into the directory",
        ),
        (
            "a size that overflows",
            wide(|e| (e.size, e.stored) = (Some(u64::MAX - 8), Some(u64::MAX - 8))),
            "runs into the directory",
        ),
        ("an offset beyond the file", with(|e| e.offset = Some(1 << 31)), "lies beyond the file"),
        ("an offset that overflows", wide(|e| e.offset = Some(u64::MAX)), "lies beyond the file"),
        ("another local name", with(|e| e.local_name = b"a/data/1".to_vec()), "another name in its local header"),
        ("two entries of one name", make(&[pickle(), data(), data()], End::default()), "two entries are called"),
        ("overlapping storages", overlapping(), "overlap at byte"),
        ("no pickle", make(&[data()], End::default()), "no data.pkl inside"),
        ("two pickles", make(&[pickle(), Entry::new("b/data.pkl", *b"N.")], End::default()), "several data.pkl"),
        ("big-endian", make(&[pickle(), Entry::new("a/byteorder", *b"big")], End::default()), "byte order \"big\""),
    ]
}

/// An entry inside of another's bytes, with a local header of its own.
fn overlapping() -> Vec<u8> {
    let inner = archive(&[Entry::new("a/data/1", [7; 16])], &End::default(), 0);
    let inner = &inner[..64 + 16];
    let outer = Entry::new("a/data/0", inner);
    let sound = archive(&[Entry::new("a/data.pkl", *b"N."), outer.clone()], &End::default(), 0);
    let offset = sound.windows(inner.len()).position(|w| w == inner).unwrap();
    let mut second = Entry::new("a/data/1", []);
    (second.size, second.stored, second.offset) = (Some(16), Some(16), Some(offset as u64));
    archive(&[Entry::new("a/data.pkl", *b"N."), outer, second], &End::default(), 0)
}

/// A table of broken pickles, without PROTO and STOP.
fn broken_pickles() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let floats = storage_id("FloatStorage", "0", 4);
    let view = |offset, shape: &[i64], strides: &[i64]| tensor(&floats, offset, shape, strides);
    let nine = [1i64; 9];
    vec![
        ("an opcode of old", b"(ios\nsystem\n".to_vec(), "opcode 0x69"),
        ("an object", b"(cos\nsystem\no".to_vec(), "os.system"),
        ("a new object", b"))\x81".to_vec(), "opcode 0x81"),
        ("an extension", b"\x82\x01".to_vec(), "opcode 0x82"),
        ("bytes", b"B\0\0\0\0".to_vec(), "opcode 0x42"),
        ("evaluation", b"cbuiltins\neval\n".to_vec(), "asks for builtins.eval"),
        ("a line in a name", b"\x8c\x02os\x8c\x07sys\ntem\x93".to_vec(), "os.sys\\ntem"),
        ("another rebuild", b"ctorch._utils\n_rebuild_sparse_tensor\n".to_vec(), "torch._utils._rebuild_sparse_tensor"),
        ("an unknown storage", storage_id("QInt8Storage", "0", 1), "torch.QInt8Storage"),
        ("a protocol of the future", b"\x80\x09N".to_vec(), "protocol 9"),
        ("a text beyond the end", b"X\xff\xff\xff\xffabc".to_vec(), "4294967295 bytes are wanted"),
        ("a text that is not UTF-8", b"\x8c\x01\xff".to_vec(), "not UTF-8"),
        ("a name without an end", b"ctorch".to_vec(), "a name has no end"),
        (
            "a frame beyond the end",
            [b"\x95".as_slice(), &u64::MAX.to_le_bytes(), b"N"].concat(),
            "a frame of 18446744073709551615",
        ),
        ("a long of 255 bytes", b"\x8a\xff".to_vec(), "an integer of 255 bytes"),
        ("nothing at the end", Vec::new(), "ends with 0 objects"),
        ("two objects at the end", b"NN".to_vec(), "ends with 2 objects"),
        ("an open mark", b"N(".to_vec(), "ends with 1 open marks"),
        ("no mark", b"t".to_vec(), "no open mark"),
        ("a tuple of too much", b"N\x86".to_vec(), "2 objects are wanted from a stack of 1"),
        ("a tuple across a mark", b"N(\x85".to_vec(), "1 objects are wanted from a stack of 0"),
        ("a memo never written", b"h\x07".to_vec(), "memo entry 7 was never written"),
        ("a memo of nothing", b"q\x00".to_vec(), "from an empty stack"),
        ("append to a dict", b"}Na".to_vec(), "appended to a dict"),
        ("set in a list", b"]NNs".to_vec(), "set in a list"),
        ("half an item", b"}(Nu".to_vec(), "1 keys and values"),
        ("a call of a number", b"K\x01)R".to_vec(), "an integer is called"),
        ("a call without a tuple", b"ccollections\nOrderedDict\nNR".to_vec(), "arguments are a tuple"),
        (
            "arguments for an OrderedDict",
            b"ccollections\nOrderedDict\nN\x85R".to_vec(),
            "an OrderedDict with arguments",
        ),
        ("a parameter of nothing", b"ctorch._utils\n_rebuild_parameter\nN\x85R".to_vec(), "not a tensor"),
        ("state for a list", b"]Nb".to_vec(), "state is given to a list"),
        ("a persistent id that is a text", [&text("x")[..], b"Q"].concat(), "a persistent id is a tuple"),
        ("a persistent id of three", b"NNN\x87Q".to_vec(), "a persistent id has 3 items"),
        ("a storage that is not there", storage_id("FloatStorage", "9", 4), "storage \"9\" is not in the archive"),
        ("a path for a key", storage_id("FloatStorage", "../data.pkl", 1), "is not in the archive"),
        (
            "a storage too long",
            storage_id("FloatStorage", "0", 5),
            "storage \"0\" of 5 numbers (f32) in an entry that holds 4",
        ),
        ("a storage of -1", storage_id("FloatStorage", "0", -1), "storage \"0\" of -1 numbers"),
        ("a storage that overflows", storage_id("DoubleStorage", "0", i64::MAX), "of 9223372036854775807 numbers"),
        ("a tensor of nothing", tensor(b"N", 0, &[1], &[1]), "a tensor without a storage"),
        ("an offset outside", view(4, &[1], &[1]), "reaches outside"),
        ("an offset that overflows", view(i64::MAX, &[2], &[i64::MAX]), "reaches outside"),
        ("a negative offset", view(-1, &[1], &[1]), "-1 where a size is expected"),
        ("a shape outside", view(0, &[5], &[1]), "reaches outside"),
        ("a stride outside", view(0, &[2, 2], &[3, 1]), "reaches outside"),
        ("a negative stride", view(3, &[2], &[-1]), "-1 where a size is expected"),
        ("a stride that overflows", view(0, &[3, 3], &[i64::MAX, i64::MAX]), "reaches outside"),
        ("a shape that overflows", view(0, &[1 << 40, 1 << 40], &[0, 0]), "[1099511627776, 1099511627776]"),
        ("a number 2^40 times", view(0, &[1 << 40], &[0]), "repeats numbers"),
        ("a missing stride", view(0, &[2, 2], &[1]), "2 dimensions with 1 strides"),
        ("nine dimensions", view(0, &nine, &nine), "a tensor of 9 dimensions"),
        (
            "a shape of texts",
            [tensor_of(&floats, &[&text("x")[..], b"\x85"].concat()), ints(&[1])].concat(),
            "a text where a size",
        ),
        ("too many objects", vec![b'N'; 1 << 20], "more than 524288 objects"),
        (
            "too much on the stack",
            [b"N\x94".to_vec(), b"h\0".repeat(1 << 20)].concat(),
            "more than 524288 objects on the stack",
        ),
        ("too many memo entries", memos(1 << 20), "more than 524288 memo entries"),
        ("too many marks", vec![b'('; 1 << 20], "nested deeper than 1024"),
        ("too long", [b"N".repeat(8 << 20), int(1)].concat(), "at most 8388608 are allowed"),
    ]
}

/// The start of a tensor over `storage`, up to and with its `shape`, closed as a call of what came so far.
fn tensor_of(storage: &[u8], shape: &[u8]) -> Vec<u8> {
    [b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, &int(0), shape, shape, b"tR"].concat()
}

fn memos(count: u32) -> Vec<u8> {
    [b"N".to_vec(), (0..count).flat_map(|i| [b"r".as_slice(), &i.to_le_bytes()].concat()).collect()].concat()
}

#[test]
fn hostile_files_are_refused() {
    let archives = broken_archives().into_iter();
    let pickles = broken_pickles().into_iter().map(|(what, pickle, says)| (what, with_pickle(pickle), says));
    for (what, bytes, says) in archives.chain(pickles) {
        let held = HELD.get();
        PEAK.set(held);
        let error = open(&bytes).map(drop).expect_err(what);
        assert!(error.contains(says), "{what}: {error:?} does not say {says:?}");
        assert!(!error.contains('\n'), "{what}: {error:?} has lines");
        let peak = PEAK.get() - held;
        assert!(peak < MEMORY_CAP, "{what}: {peak} bytes at peak");
    }
}

#[test]
fn nothing_is_executed() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let command = format!("touch {}", trace.display());
    for name in ["os", "posix", "nt", "subprocess"] {
        let call = [format!("c{name}\nsystem\n").into_bytes(), text(&command), b"\x85R".to_vec()].concat();
        let error = open(&with_pickle(call)).map(drop).unwrap_err();
        assert!(error.contains(&format!("asks for {name}.system, which no weights need: refused")), "{error}");
    }
    assert!(!trace.exists());
}

#[test]
fn aliases_cycles_and_depth_are_harmless() {
    let held = HELD.get();
    PEAK.set(held);
    // A list that holds itself, 2^18 lists in one another, and a list whose copies would be 2^100 items.
    let cycle = open(&with_pickle(b"]q\x00h\x00a")).unwrap();
    assert_eq!(cycle.root().items().unwrap().next().unwrap().kind(), "a list");
    let depth = open(&with_pickle([b"]".repeat(1 << 18), b"a".repeat((1 << 18) - 1)].concat())).unwrap();
    assert_eq!(depth.root().items().unwrap().len(), 1);
    let doubled = (0u8..100).flat_map(|i| [b'q', i, b'h', i, 0x86]).collect::<Vec<_>>();
    let laughs = open(&with_pickle([b"]".to_vec(), doubled].concat())).unwrap();
    assert_eq!(laughs.root().items().unwrap().len(), 2);
    assert!(PEAK.get() - held < MEMORY_CAP);
    let twice = open(&with_pickle([&b"}("[..], &text("k"), b"N", &text("k"), b"Nu"].concat())).unwrap();
    assert_eq!(twice.root().entries().unwrap_err().to_string(), "key \"k\" comes twice");
}

#[test]
fn truncation_anywhere_is_an_error() {
    let bytes = sample();
    assert!(open(&bytes).is_ok());
    for len in 0..bytes.len() {
        assert!(open(&bytes[..len]).is_err(), "a file cut to {len} of {} bytes", bytes.len());
    }
}

#[test]
fn mutations_never_panic() {
    let bytes = sample();
    let path = tempfile::NamedTempFile::new().unwrap();
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let file = TorchFile::open(Path::new(path.path()));
        file.map(|file| read_all(file.root(), 4)).is_ok()
    };
    let interesting = [0x00, 0x01, 0x7f, 0x80, 0xff];
    let mut refused = 0;
    for at in 0..bytes.len() {
        for value in interesting {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            refused += usize::from(!open(&bytes));
        }
    }
    assert!(refused > 100, "only {refused} changes of a byte were refused");
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..4_000 {
        let mut bytes = bytes.clone();
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        open(&bytes);
    }
}
