//! A writer of `.pt` files, good ones and broken ones: an archive of stored entries, a pickle, storages.

/// An entry of an archive, with what its headers claim.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) local_name: Vec<u8>,
    pub(crate) data: Vec<u8>,
    pub(crate) flags: u16,
    pub(crate) method: u16,
    /// Claimed sizes as they are after unpacking and as stored, and the local header's offset; `None` is the truth.
    pub(crate) size: Option<u64>,
    pub(crate) stored: Option<u64>,
    pub(crate) offset: Option<u64>,
}

impl Entry {
    pub(crate) fn new(name: &str, data: impl Into<Vec<u8>>) -> Self {
        let name = name.as_bytes().to_vec();
        let local_name = name.clone();
        Self { name, local_name, data: data.into(), flags: 0, method: 0, size: None, stored: None, offset: None }
    }
}

/// Claims of an archive's end records; `None` is the truth.
#[derive(Default)]
pub(crate) struct End {
    pub(crate) entries: Option<u64>,
    pub(crate) directory: Option<u64>,
    /// Where the ZIP64 record is said to be.
    pub(crate) record: Option<u64>,
    /// Whether the sizes of entries are in ZIP64 fields, and those fields left out on top.
    pub(crate) wide: bool,
    pub(crate) without_extra: bool,
}

/// An archive whose entries start `skew` bytes behind a multiple of 64.
pub(crate) fn archive(entries: &[Entry], end: &End, skew: usize) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let offset = file.len();
        let padding = (64 + skew - (offset + 30 + entry.local_name.len()) % 64) % 64;
        file.extend(*b"PK\x03\x04");
        file.extend([0; 22]);
        file.extend((entry.local_name.len() as u16).to_le_bytes());
        file.extend((padding as u16).to_le_bytes());
        file.extend(&entry.local_name);
        file.extend(vec![0; padding]);
        file.extend(&entry.data);
        directory.extend(central_header(entry, offset, end));
    }
    let start = end.directory.unwrap_or(file.len() as u64);
    let count = end.entries.unwrap_or(entries.len() as u64);
    let size = directory.len() as u64;
    file.extend(directory);
    if end.wide {
        let record = end.record.unwrap_or(file.len() as u64);
        file.extend(*b"PK\x06\x06");
        file.extend(44u64.to_le_bytes());
        file.extend([0; 12]);
        for value in [count, count, size, start] {
            file.extend(value.to_le_bytes());
        }
        file.extend(*b"PK\x06\x07");
        file.extend([0; 4]);
        file.extend(record.to_le_bytes());
        file.extend([0; 4]);
    }
    file.extend(*b"PK\x05\x06");
    file.extend([0; 4]);
    file.extend([(count as u16).to_le_bytes(), (count as u16).to_le_bytes()].concat());
    file.extend([(size as u32).to_le_bytes(), (start as u32).to_le_bytes()].concat());
    file.extend([0; 2]);
    file
}

fn central_header(entry: &Entry, offset: usize, end: &End) -> Vec<u8> {
    let values = [
        entry.size.unwrap_or(entry.data.len() as u64),
        entry.stored.unwrap_or(entry.data.len() as u64),
        entry.offset.unwrap_or(offset as u64),
    ];
    let extra: Vec<u8> = match (end.wide, end.without_extra) {
        // A field of another kind comes first: readers have to skip it.
        (true, false) => [vec![9, 9, 2, 0, 7, 7, 1, 0, 24, 0], values.map(u64::to_le_bytes).concat()].concat(),
        _ => Vec::new(),
    };
    let narrow = values.map(|value| if end.wide { u32::MAX } else { value as u32 });
    let mut header = b"PK\x01\x02\0\0\0\0".to_vec();
    header.extend([entry.flags.to_le_bytes(), entry.method.to_le_bytes()].concat());
    header.extend([0; 8]);
    header.extend([narrow[1].to_le_bytes(), narrow[0].to_le_bytes()].concat());
    header.extend([(entry.name.len() as u16).to_le_bytes(), (extra.len() as u16).to_le_bytes()].concat());
    header.extend([0; 10]);
    header.extend(narrow[2].to_le_bytes());
    header.extend(&entry.name);
    header.extend(extra);
    header
}

/// What `torch.save` takes.
pub(crate) enum Node {
    Dict(Vec<(String, Node)>),
    List(Vec<Node>),
    Tensor(Array),
}

/// A tensor of its own storage, row-major.
#[derive(Clone)]
pub(crate) struct Array {
    /// Its type as `torch` names it: `HalfStorage` …
    pub(crate) storage: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// The file that `torch.save` would write.
pub(crate) fn save(root: &Node) -> Vec<u8> {
    let (mut pickle, mut storages) = (vec![0x80, 2], Vec::new());
    put(root, &mut pickle, &mut storages);
    pickle.push(b'.');
    let mut entries = vec![Entry::new("archive/data.pkl", pickle), Entry::new("archive/byteorder", *b"little")];
    let data = storages.into_iter().enumerate();
    entries.extend(data.map(|(key, bytes)| Entry::new(&format!("archive/data/{key}"), bytes)));
    archive(&entries, &End::default(), 0)
}

fn put(node: &Node, pickle: &mut Vec<u8>, storages: &mut Vec<Vec<u8>>) {
    match node {
        Node::Dict(items) => {
            pickle.extend(*b"}(");
            for (key, value) in items {
                pickle.extend(text(key));
                put(value, pickle, storages);
            }
            pickle.push(b'u');
        }
        Node::List(items) => {
            pickle.extend(*b"](");
            items.iter().for_each(|item| put(item, pickle, storages));
            pickle.push(b'e');
        }
        Node::Tensor(Array { storage, shape, bytes }) => {
            let len: usize = shape.iter().product();
            let mut strides = vec![1i64; shape.len()];
            for i in (1..shape.len()).rev() {
                strides[i - 1] = strides[i] * shape[i] as i64;
            }
            let shape: Vec<_> = shape.iter().map(|&size| size as i64).collect();
            pickle.extend(tensor(&storage_id(storage, &storages.len().to_string(), len as i64), 0, &shape, &strides));
            storages.push(bytes.clone());
        }
    }
}

/// BINUNICODE
pub(crate) fn text(text: &str) -> Vec<u8> {
    [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

/// LONG1 of eight bytes
pub(crate) fn int(value: i64) -> Vec<u8> {
    [b"\x8a\x08".as_slice(), &value.to_le_bytes()].concat()
}

/// A tuple of integers
pub(crate) fn ints(values: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().flat_map(|&value| int(value)).collect(), b"t".to_vec()].concat()
}

/// A storage of the archive.
pub(crate) fn storage_id(storage: &str, key: &str, len: i64) -> Vec<u8> {
    let global = format!("ctorch\n{storage}\n");
    [b"(", &text("storage")[..], global.as_bytes(), &text(key), &text("cpu"), &int(len), b"tQ"].concat()
}

/// A tensor over `storage`.
pub(crate) fn tensor(storage: &[u8], offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let hooks = b"\x89ccollections\nOrderedDict\n)RtR";
    let rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(";
    [rebuild, storage, &int(offset), &ints(shape), &ints(strides), hooks].concat()
}
