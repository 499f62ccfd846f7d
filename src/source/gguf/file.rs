//! The container: a header of typed metadata, a table of tensors, aligned data. Nothing in the header is
//! trusted: every length is checked against the file before it is used, and nothing is copied up front.

use std::collections::HashMap;
use std::fmt;

use anyhow::{Context, Result, bail, ensure};

use super::blocks::Kind;
use crate::source::archive::Bytes;

/// The largest number of dimensions that the format allows.
const MAX_DIMENSIONS: u32 = 4;

/// Metadata values; files of llama.cpp's converter have some 30.
const MAX_VALUES: u64 = 1 << 10;

/// Tensors; a model of 405 billion weights has 1,138.
const MAX_TENSORS: u64 = 1 << 14;

/// Bytes of a tensor's name or a key. With the two limits above, the table of a hostile file takes some 20 MB.
const MAX_NAME: usize = 1 << 10;

/// Elements of a list that is read: tokens, their merges, their scores.
const MAX_LIST: usize = 1 << 20;

/// A parsed GGUF, versions 2 and 3, little-endian.
#[derive(Debug)]
pub(super) struct File {
    bytes: Bytes,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Tensor>,
}

/// Where a tensor lies and what it is.
#[derive(Debug)]
pub(super) struct Tensor {
    /// As the file numbers them; not all are known.
    kind: u32,
    /// Slowest dimension first, as everywhere outside GGUF.
    shape: Vec<usize>,
    /// In the whole file; empty if the type is unknown.
    bytes: std::ops::Range<usize>,
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    /// Where the text is: not copied, it may be as long as the file.
    Text(std::ops::Range<usize>),
    /// Type and number of the elements, and where they start.
    Array {
        kind: u32,
        count: usize,
        start: usize,
    },
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(n) => n.fmt(f),
            // Nearly all are single precision: 0.2, not 0.20000000298023224.
            Self::Float(n) => (*n as f32).fmt(f),
            Self::Bool(b) => b.fmt(f),
            Self::Text(_) => f.write_str("a string"),
            Self::Array { count, .. } => write!(f, "a list of {count}"),
        }
    }
}

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Size of a scalar of this type.
fn scalar_size(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

impl File {
    pub(super) fn parse(bytes: Bytes) -> Result<Self> {
        let mut cursor = Cursor { bytes: &bytes, at: 0 };
        ensure!(cursor.take(4).ok() == Some(b"GGUF"), "not a GGUF file: it does not start with \"GGUF\"");
        let version = cursor.u32()?;
        ensure!(
            !matches!(version.swap_bytes(), 1..=3),
            "the file is big-endian, convert the model again for a little-endian machine"
        );
        ensure!(
            matches!(version, 2 | 3),
            "GGUF version {version} is not supported, 2 or 3 is expected: convert the model again"
        );
        let (tensor_count, value_count) = (cursor.u64()?, cursor.u64()?);
        ensure!(tensor_count <= MAX_TENSORS, "{tensor_count} tensors, at most {MAX_TENSORS} are expected");
        ensure!(value_count <= MAX_VALUES, "{value_count} metadata values, at most {MAX_VALUES} are expected");

        let mut metadata = HashMap::new();
        for _ in 0..value_count {
            let key = cursor.name()?.to_owned();
            let kind = cursor.u32()?;
            let value = cursor.value(kind).with_context(|| format!("in the metadata {key:?}"))?;
            ensure!(!metadata.contains_key(&key), "the metadata {key:?} comes twice");
            metadata.insert(key, value);
        }
        let mut headers = Vec::new();
        for _ in 0..tensor_count {
            headers.push(cursor.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Integer(n @ 1..=4096)) => *n as usize,
            Some(other) => bail!("general.alignment is {other}, 1 to 4096 is expected"),
        };
        let data_start = cursor.at.next_multiple_of(alignment);
        let mut tensors = HashMap::new();
        for (name, kind, shape, offset) in headers {
            let tensor = Tensor::place(kind, shape, data_start as u64, offset, bytes.len());
            let tensor = tensor.with_context(|| format!("in tensor {name}"))?;
            ensure!(!tensors.contains_key(&name), "tensor {name:?} comes twice");
            tensors.insert(name, tensor);
        }
        Ok(Self { bytes, metadata, tensors })
    }

    /// The names of all metadata values.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// The names of all tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub(super) fn data(&self, tensor: &Tensor) -> &[u8] {
        &self.bytes[tensor.bytes.clone()]
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => {
                u64::try_from(*n).ok().map(Some).with_context(|| format!("{key} is {n}, 0 or more is expected"))
            }
            Some(other) => bail!("{key} is {other}, an integer is expected"),
        }
    }

    /// An integer that every layer has, said once for all of the `layers` or for each.
    pub(super) fn integer_of_layers(&self, key: &str, layers: u64) -> Result<Option<u64>> {
        let Some(&Value::Array { kind: kind @ (U32 | I32), count, .. }) = self.metadata.get(key) else {
            return self.integer(key);
        };
        ensure!(count as u64 == layers, "{key} has {count} values, the model has {layers} layers");
        let values = self.list(key, kind, |cursor| {
            let word = cursor.u32()?;
            let n = if kind == I32 { i64::from(word as i32) } else { word.into() };
            u64::try_from(n).ok().with_context(|| format!("{key} has {n}, 0 or more is expected"))
        })?;
        let first = values.first().copied();
        if let Some(layer) = values.iter().position(|&value| Some(value) != first) {
            let (first, other) = (values[0], values[layer]);
            bail!("{key} is {first} in layer 0 and {other} in layer {layer}, one for all layers is expected");
        }
        Ok(first)
    }

    /// A truth value for each of the `layers`; none if it is no list.
    pub(super) fn booleans_of_layers(&self, key: &str, layers: u64) -> Result<Option<Vec<bool>>> {
        let Some(&Value::Array { count, .. }) = self.metadata.get(key) else { return Ok(None) };
        ensure!(count as u64 == layers, "{key} has {count} values, the model has {layers} layers");
        self.list(key, BOOL, |cursor| Ok(cursor.array::<1>()? != [0])).map(Some)
    }

    /// A number of any type, or a truth value as 0 or 1; none if it is something else.
    pub(super) fn number(&self, key: &str) -> Option<f64> {
        match *self.metadata.get(key)? {
            Value::Integer(n) => Some(n as f64),
            Value::Float(n) => Some(n),
            Value::Bool(b) => Some(b.into()),
            _ => None,
        }
    }

    /// A value in words; empty if there is none.
    pub(super) fn described(&self, key: &str) -> String {
        self.metadata.get(key).map(Value::to_string).unwrap_or_default()
    }

    /// How many elements a list has; 0 when missing.
    pub(super) fn len(&self, key: &str) -> usize {
        if let Some(&Value::Array { count, .. }) = self.metadata.get(key) { count } else { 0 }
    }

    /// A value that `read` makes something of; none when missing.
    fn value<'a, T>(&'a self, key: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        read(value).map(Some).with_context(|| format!("{key} is {value}, {wanted} is expected"))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.value(key, "a floating-point number", |value| if let Value::Float(n) = value { Some(*n) } else { None })
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.value(key, "true or false", |value| if let Value::Bool(b) = value { Some(*b) } else { None })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        let place =
            self.value(key, "a string", |value| if let Value::Text(place) = value { Some(place) } else { None });
        place?.map(|place| text(&self.bytes[place.clone()])).transpose()
    }

    /// A list of strings; empty when missing.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<&str>> {
        self.list(key, TEXT, Cursor::text)
    }

    /// A list of 32-bit integers; empty when missing.
    pub(super) fn i32s(&self, key: &str) -> Result<Vec<i32>> {
        self.list(key, I32, |cursor| Ok(cursor.u32()? as i32))
    }

    /// A list of single-precision numbers; empty when missing.
    pub(super) fn f32s(&self, key: &str) -> Result<Vec<f32>> {
        self.list(key, F32, |cursor| Ok(f32::from_bits(cursor.u32()?)))
    }

    /// A list of elements of type `wanted`, each as `read` reads it; empty when missing.
    fn list<'a, T>(&'a self, key: &str, wanted: u32, read: impl Fn(&mut Cursor<'a>) -> Result<T>) -> Result<Vec<T>> {
        match self.metadata.get(key) {
            None => Ok(Vec::new()),
            Some(&Value::Array { kind, count, start }) if kind == wanted => {
                ensure!(count <= MAX_LIST, "{key} has {count} elements, at most {MAX_LIST} are expected");
                let mut cursor = Cursor { bytes: &self.bytes, at: start };
                (0..count).map(|_| read(&mut cursor)).collect()
            }
            Some(other) => bail!("{key} is {other}, a list of values of type {wanted} is expected"),
        }
    }
}

impl Tensor {
    /// Checks that the data lie inside the file.
    fn place(kind: u32, shape: Vec<usize>, data_start: u64, offset: u64, file_len: usize) -> Result<Self> {
        let Some(known) = Kind::from_id(kind) else {
            return Ok(Self { kind, shape, bytes: 0..0 });
        };
        let (block, block_bytes) = known.block();
        let columns = shape.last().copied().unwrap_or(1);
        ensure!(columns.is_multiple_of(block), "rows of {columns} numbers, a multiple of {block} is expected");
        let count = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let place = count.and_then(|count| (count / block).checked_mul(block_bytes)).and_then(|len| {
            let start = usize::try_from(data_start.checked_add(offset)?).ok()?;
            Some(start..start.checked_add(len)?)
        });
        let Some(bytes) = place.filter(|place| place.end <= file_len) else {
            bail!("shape {shape:?} at {offset} ends behind the file's {file_len} bytes: it is truncated");
        };
        Ok(Self { kind, shape, bytes })
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(super) fn kind(&self) -> Result<Kind> {
        Kind::from_id(self.kind)
            .with_context(|| format!("type {} is not supported, {} is expected", name(self.kind), Kind::names()))
    }
}

/// What ggml calls its types, by number; those without a name are gone.
const NAMES: [&str; 40] = [
    "F32", "F16", "Q4_0", "Q4_1", "", "", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "", "", "", "", "F64",
    "IQ1_M", "BF16", "", "", "", "TQ1_0", "TQ2_0", "", "", "", "MXFP4",
];

/// What ggml calls a type, or its number.
fn name(kind: u32) -> String {
    match NAMES.get(kind as usize) {
        Some(&name) if !name.is_empty() => name.to_owned(),
        _ => kind.to_string(),
    }
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).context("a string that is not UTF-8")
}

/// Reads forward, never past the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            bail!("the file is truncated: {len} bytes at {} of {} are missing", self.at, self.bytes.len());
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn len(&mut self) -> Result<usize> {
        let len = self.u64()?;
        usize::try_from(len).with_context(|| format!("a length of {len}: the file is damaged"))
    }

    fn text(&mut self) -> Result<&'a str> {
        let len = self.len()?;
        text(self.take(len)?)
    }

    /// A key or the name of a tensor.
    fn name(&mut self) -> Result<&'a str> {
        let name = self.text()?;
        ensure!(name.len() <= MAX_NAME, "a name of {} bytes, at most {MAX_NAME} are expected", name.len());
        Ok(name)
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(u32::from_le_bytes(self.array()?).into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            TEXT => {
                let len = self.text()?.len();
                Value::Text(self.at - len..self.at)
            }
            ARRAY => self.array_value()?,
            10 => Value::Integer(u64::from_le_bytes(self.array()?).into()),
            11 => Value::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => bail!("metadata type {other} is unknown, 0 to 12 is expected"),
        })
    }

    /// Steps over an array and notes where it is.
    fn array_value(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        let count = self.len()?;
        let start = self.at;
        if kind == TEXT {
            for _ in 0..count {
                self.text()?;
            }
        } else {
            let size = scalar_size(kind).with_context(|| format!("a list of type {kind} is not supported"))?;
            self.take(count.checked_mul(size).context("a list longer than the file: it is damaged")?)?;
        }
        Ok(Value::Array { kind, count, start })
    }

    /// `(name, type, shape, offset)` of the next tensor.
    fn tensor(&mut self) -> Result<(String, u32, Vec<usize>, u64)> {
        let name = self.name()?.to_owned();
        let dimensions = self.u32()?;
        ensure!(dimensions <= MAX_DIMENSIONS, "tensor {name} has {dimensions} dimensions, at most 4 are expected");
        let mut shape = (0..dimensions).map(|_| self.len()).collect::<Result<Vec<_>>>()?;
        shape.reverse();
        Ok((name, self.u32()?, shape, self.u64()?))
    }
}
