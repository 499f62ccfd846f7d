//! Files that `torch.save` wrote (`.pt`, `.bin`), memory-mapped; nothing in them is ever executed.
//!
//! Such a file is a ZIP archive of stored entries: `data.pkl`, a pickle that describes dicts, lists and
//! tensors, and `data/0`, `data/1` …, the little-endian numbers. [`TorchFile::open`] reads the directory and
//! the pickle, checks every range and keeps the description; numbers are borrowed from the map.
//!
//! Beyond the map, a file costs less than 64 MB however it was made.

mod archive;
mod pickle;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use bytemuck::Pod;

use self::archive::Archive;
pub(super) use self::archive::End;
pub(super) use self::pickle::Id;
use self::pickle::{Object, View};
use crate::format::Floats;
use crate::mapped::Mapped;
use crate::tensors::numbers;

const _: () = assert!(cfg!(target_endian = "little"), "numbers are borrowed as they are stored, little-endian");

/// The type of a tensor's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// Signed, 64 bits.
    I64,
    /// Signed, 32 bits.
    I32,
    /// Signed, 16 bits.
    I16,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 8 bits.
    U8,
    /// A truth value in a byte.
    Bool,
}

impl DType {
    /// Every type with the storage that `torch` has for it, its name in messages, and the bytes of a number.
    const ALL: [(Self, &str, &str, usize); 10] = [
        (Self::F16, "HalfStorage", "f16", 2),
        (Self::Bf16, "BFloat16Storage", "bf16", 2),
        (Self::F32, "FloatStorage", "f32", 4),
        (Self::F64, "DoubleStorage", "f64", 8),
        (Self::I64, "LongStorage", "i64", 8),
        (Self::I32, "IntStorage", "i32", 4),
        (Self::I16, "ShortStorage", "i16", 2),
        (Self::I8, "CharStorage", "i8", 1),
        (Self::U8, "ByteStorage", "u8", 1),
        (Self::Bool, "BoolStorage", "bool", 1),
    ];

    /// Bytes of one number.
    pub const fn bytes(self) -> usize {
        Self::ALL[self as usize].3
    }

    /// The type that `torch.{name}` stores.
    fn of_storage(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, storage, ..)| *storage == name).map(|(dtype, ..)| dtype)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL[*self as usize].2)
    }
}

/// A file that `torch.save` wrote.
#[derive(Debug)]
pub struct TorchFile {
    map: Mapped,
    objects: Vec<Object>,
    root: Id,
}

impl TorchFile {
    /// Maps `path` and reads its description. The file must not change while it is open.
    ///
    /// # Errors
    /// Whatever keeps the file from being a plain archive of dicts, lists and tensors whose every range lies
    /// inside it: truncation, compression, overlaps, strides that leave a storage, globals other than those of
    /// weights (by name), big-endian numbers, and sizes far beyond any model's.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(Mapped::open(path)?).with_context(|| path.display().to_string())
    }

    fn read(map: Mapped) -> Result<Self> {
        let archive = Archive::read(&map)?;
        if let Some(order) = archive.find("byteorder") {
            let order = &map[order];
            ensure!(order == b"little", "byte order {:?}, \"little\" is expected", String::from_utf8_lossy(order));
        }
        let pickle = archive.find("data.pkl").context("no data.pkl in the archive")?;
        let (objects, root) = pickle::read(&map[pickle], &|key| archive.find(&format!("data/{key}")))?;
        Ok(Self { map, objects, root })
    }

    /// What was saved.
    pub fn root(&self) -> Value<'_> {
        self.value(self.root)
    }

    /// The object that [`Value::id`] named in this same file.
    pub(super) fn value(&self, id: Id) -> Value<'_> {
        Value { file: self, id }
    }
}

/// One object of a file.
#[derive(Debug, Clone, Copy)]
pub struct Value<'a> {
    file: &'a TorchFile,
    id: Id,
}

impl<'a> Value<'a> {
    fn object(self) -> &'a Object {
        &self.file.objects[self.id as usize]
    }

    fn at(self, id: Id) -> Self {
        Self { file: self.file, id }
    }

    /// The entries of a dict whose keys are texts.
    ///
    /// # Errors
    /// Something else, or a key that comes twice.
    pub fn entries(self) -> Result<BTreeMap<&'a str, Self>> {
        let Object::Dict(items) = self.object() else { bail!("{} where a dict is expected", self.kind()) };
        let mut entries = BTreeMap::new();
        for &(key, value) in items {
            let Object::Str(key) = self.at(key).object() else {
                bail!("a dict's key is {}, a text is expected", self.at(key).kind());
            };
            ensure!(entries.insert(&**key, self.at(value)).is_none(), "key {key:?} comes twice");
        }
        Ok(entries)
    }

    /// The items of a list or tuple.
    ///
    /// # Errors
    /// Something else.
    pub fn items(self) -> Result<impl ExactSizeIterator<Item = Self>> {
        match self.object() {
            Object::List(items) | Object::Tuple(items) => Ok(items.iter().map(move |&id| self.at(id))),
            other => bail!("{} where a list is expected", other.kind()),
        }
    }

    /// The tensor.
    ///
    /// # Errors
    /// Something else.
    pub fn tensor(self) -> Result<Tensor<'a>> {
        match self.object() {
            Object::Tensor(view) => Ok(Tensor { view, bytes: &self.file.map[view.start..] }),
            other => bail!("{} where a tensor is expected", other.kind()),
        }
    }

    /// The text; `None` for anything else.
    pub fn text(self) -> Option<&'a str> {
        if let Object::Str(text) = self.object() { Some(text) } else { None }
    }

    /// The number, whole, broken or a truth value; `None` for anything else.
    pub fn number(self) -> Option<f64> {
        match *self.object() {
            Object::Int(value) => Some(value as f64),
            Object::Float(value) => Some(value),
            Object::Bool(value) => Some(value.into()),
            _ => None,
        }
    }

    /// Its place in this file, to come back to it.
    pub(super) fn id(self) -> Id {
        self.id
    }

    /// What it is, for messages: `a dict`, `a tensor`, `nothing` …
    pub fn kind(self) -> &'static str {
        self.object().kind()
    }
}

/// A tensor in a file: a strided window into a storage that other tensors may share.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    view: &'a View,
    bytes: &'a [u8], // from the first number on
}

impl<'a> Tensor<'a> {
    /// The type of the numbers.
    pub fn dtype(self) -> DType {
        self.view.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(self) -> &'a [usize] {
        &self.view.shape
    }

    /// The numbers of a floating-point tensor in row-major order: borrowed when they lie so, else gathered.
    /// f64 is rounded to f32.
    ///
    /// # Errors
    /// A tensor of integers.
    pub fn floats(self) -> Result<Floats<'a>> {
        Ok(match self.dtype() {
            DType::F16 => Floats::F16(self.numbers()),
            DType::Bf16 => Floats::Bf16(self.numbers()),
            DType::F32 => Floats::F32(self.numbers()),
            DType::F64 => self.numbers::<f64>().iter().map(|&x| x as f32).collect::<Vec<_>>().into(),
            other => bail!("a tensor of {other}, floating-point numbers are expected"),
        })
    }

    /// The bits of an i32 tensor in row-major order: borrowed when they lie so, else gathered.
    ///
    /// # Errors
    /// Another type.
    pub fn words(self) -> Result<Cow<'a, [u32]>> {
        ensure!(self.dtype() == DType::I32, "a tensor of {}, i32 is expected", self.dtype());
        Ok(self.numbers())
    }

    /// The numbers of an integer or bool tensor in row-major order.
    ///
    /// # Errors
    /// A tensor of floating-point numbers.
    pub fn integers(self) -> Result<Vec<i64>> {
        Ok(match self.dtype() {
            DType::I64 => self.numbers().into_owned(),
            DType::I32 => self.numbers::<i32>().iter().map(|&x| x.into()).collect(),
            DType::I16 => self.numbers::<i16>().iter().map(|&x| x.into()).collect(),
            DType::I8 => self.numbers::<i8>().iter().map(|&x| x.into()).collect(),
            DType::U8 => self.numbers::<u8>().iter().map(|&x| x.into()).collect(),
            DType::Bool => self.numbers::<u8>().iter().map(|&x| (x != 0).into()).collect(),
            other => bail!("a tensor of {other}, integers are expected"),
        })
    }

    /// Every number in row-major order. `T` is as wide as the tensor's type.
    fn numbers<T: Pod>(self) -> Cow<'a, [T]> {
        let View { shape, strides, .. } = self.view;
        let len: usize = shape.iter().product();
        if len == 0 {
            return Cow::Owned(Vec::new());
        }
        if self.is_contiguous() {
            return numbers(&self.bytes[..len * size_of::<T>()]);
        }
        let mut index = vec![0; shape.len()];
        let gathered = (0..len).map(|_| {
            let at: usize = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
            for (i, &size) in index.iter_mut().zip(shape).rev() {
                *i += 1;
                if *i < size {
                    break;
                }
                *i = 0;
            }
            bytemuck::pod_read_unaligned(&self.bytes[at * size_of::<T>()..][..size_of::<T>()])
        });
        Cow::Owned(gathered.collect())
    }

    fn is_contiguous(self) -> bool {
        let mut expected = 1;
        self.view.shape.iter().zip(&self.view.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    }
}
