//! The stack machine that reads a pickle without running it.
//!
//! Opcodes are those that `torch.save` uses for dicts, lists and tensors (spec §2.6; Python's `pickletools`
//! says what each one does). A global is a name to compare with a short list: anything else is refused, and
//! nothing is ever imported or called. Objects live in one arena and refer to each other by index, so that
//! aliases, cycles and deep nesting cost what their bytes cost and never recurse.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use super::DType;

/// The largest pickle: that of a 405B model has about 1 MB.
const MAX_BYTES: usize = 8 << 20;

/// Objects, stack and memo each hold at most this many; the largest models make about 100,000 objects.
const MAX_OBJECTS: usize = 1 << 19;

/// Marks that are open at once; a state dict needs four.
const MAX_MARKS: usize = 1 << 10;

/// Dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;

/// An index into the arena.
pub(in crate::source) type Id = u32;

/// What a pickle is made of.
#[derive(Debug)]
pub(super) enum Object {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Box<str>),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage),
    Tensor(Box<View>),
}

/// The few globals that are understood.
#[derive(Debug, Clone, Copy)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(DType),
}

/// A run of numbers in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage {
    dtype: DType,
    /// The first byte, counted from the start of the file.
    start: usize,
    /// How many numbers.
    len: usize,
}

/// A tensor: a strided window into a storage, checked to lie inside it.
#[derive(Debug)]
pub(super) struct View {
    pub(super) dtype: DType,
    /// The first byte, counted from the start of the file.
    pub(super) start: usize,
    pub(super) shape: Vec<usize>,
    /// In numbers, one for each dimension.
    pub(super) strides: Vec<usize>,
}

/// Runs `pickle` and returns the arena and its root. `storage` finds the bytes of a storage by its key.
pub(super) fn read(pickle: &[u8], storage: &dyn Fn(&str) -> Option<Range<usize>>) -> Result<(Vec<Object>, Id)> {
    let size = pickle.len();
    ensure!(size <= MAX_BYTES, "pickle: {size} bytes, at most {MAX_BYTES} are allowed");
    let mut machine = Machine {
        pickle,
        at: 0,
        objects: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        storage,
    };
    loop {
        let at = machine.at;
        if let Some(root) = machine.step().with_context(|| format!("pickle, byte {at}"))? {
            return Ok((machine.objects, root));
        }
    }
}

struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    storage: &'a dyn Fn(&str) -> Option<Range<usize>>,
}

impl<'a> Machine<'a> {
    /// One opcode; the root object once it is STOP.
    fn step(&mut self) -> Result<Option<Id>> {
        let [opcode] = self.array()?;
        // Most opcodes make an object, all others return.
        let object = match opcode {
            b'.' => return self.stop().map(Some),
            b'N' => Object::None,
            0x88 | 0x89 => Object::Bool(opcode == 0x88),
            b'J' => Object::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Object::Int(u8::from_le_bytes(self.array()?).into()),
            b'M' => Object::Int(u16::from_le_bytes(self.array()?).into()),
            0x8a => self.long()?,
            b'G' => Object::Float(f64::from_be_bytes(self.array()?)),
            b'X' | 0x8c => {
                let len = self.number(opcode == b'X')?;
                let text = str::from_utf8(self.bytes(len as usize)?).context("a text is not UTF-8")?;
                Object::Str(text.into())
            }
            b'}' => Object::Dict(Vec::new()),
            b']' => Object::List(Vec::new()),
            b')' => Object::Tuple(Vec::new()),
            b'd' => Object::Dict(pairs(&self.pop_mark()?)?),
            b'l' => Object::List(self.pop_mark()?),
            b't' => Object::Tuple(self.pop_mark()?),
            0x85..=0x87 => Object::Tuple(self.pop_many(usize::from(opcode - 0x84))?),
            b'c' => Object::Global(global(self.line()?, self.line()?)?),
            0x93 => self.stack_global()?,
            b'Q' => self.persistent_id()?,
            other => return self.change(other).map(|()| None),
        };
        self.push(object)?;
        Ok(None)
    }

    /// An opcode that makes no object of its own.
    fn change(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => {
                let [version] = self.array()?;
                ensure!((2..=5).contains(&version), "protocol {version}, 2 to 5 are understood");
                Ok(())
            }
            0x95 => self.skip_frame(),
            b'(' => self.mark(),
            b'a' | b'e' => {
                let items = if opcode == b'a' { self.pop_many(1)? } else { self.pop_mark()? };
                self.append(&items)
            }
            b's' | b'u' => {
                let items = if opcode == b's' { self.pop_many(2)? } else { self.pop_mark()? };
                self.set_items(&items)
            }
            b'q' | b'r' => {
                let index = self.number(opcode == b'r')?;
                self.memoize(index)
            }
            0x94 => self.memoize(self.memo.len() as u32),
            b'h' | b'j' => {
                let index = self.number(opcode == b'j')?;
                self.recall(index)
            }
            b'R' => self.reduce(),
            b'b' => self.build(),
            _ => bail!("opcode {opcode:#04x} has no place in a file of weights, refused"),
        }
    }

    /// A number of four bytes, or of one.
    fn number(&mut self, is_long: bool) -> Result<u32> {
        Ok(if is_long { u32::from_le_bytes(self.array()?) } else { u8::from_le_bytes(self.array()?).into() })
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        let bytes = self.pickle[self.at..].get(..len);
        let left = self.pickle.len() - self.at;
        let bytes =
            bytes.with_context(|| format!("{len} bytes are wanted and {left} are left: is the file truncated?"))?;
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    /// Up to the next newline, which is taken too.
    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.pickle[self.at..];
        let len = rest.iter().position(|&byte| byte == b'\n').context("a name has no end: is the file truncated?")?;
        let line = self.bytes(len + 1)?;
        str::from_utf8(&line[..len]).context("a name is not UTF-8")
    }

    /// Frames only help readers of streams; the length still has to be possible.
    fn skip_frame(&mut self) -> Result<()> {
        let len = u64::from_le_bytes(self.array()?);
        let left = self.pickle.len() - self.at;
        ensure!(len <= left as u64, "a frame of {len} bytes where {left} are left: is the file truncated?");
        Ok(())
    }

    fn stop(&mut self) -> Result<Id> {
        ensure!(self.marks.is_empty(), "the pickle ends with {} open marks", self.marks.len());
        match self.stack[..] {
            [root] => Ok(root),
            _ => bail!("the pickle ends with {} objects on the stack, 1 is expected", self.stack.len()),
        }
    }

    fn push(&mut self, object: Object) -> Result<()> {
        ensure!(self.objects.len() < MAX_OBJECTS, "more than {MAX_OBJECTS} objects");
        self.objects.push(object);
        self.push_id(self.objects.len() as Id - 1)
    }

    fn push_id(&mut self, id: Id) -> Result<()> {
        ensure!(self.stack.len() < MAX_OBJECTS, "more than {MAX_OBJECTS} objects on the stack");
        self.stack.push(id);
        Ok(())
    }

    fn mark(&mut self) -> Result<()> {
        ensure!(self.marks.len() < MAX_MARKS, "nested deeper than {MAX_MARKS} levels");
        self.marks.push(self.stack.len());
        Ok(())
    }

    /// The objects above the last mark, which goes with them.
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().context("no open mark")?;
        Ok(self.stack.split_off(mark))
    }

    /// The top `n` objects, none of which may lie below the last mark.
    fn pop_many(&mut self, n: usize) -> Result<Vec<Id>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let available = self.stack.len() - floor;
        ensure!(n <= available, "{n} objects are wanted from a stack of {available}");
        Ok(self.stack.split_off(self.stack.len() - n))
    }

    fn pop(&mut self) -> Result<Id> {
        Ok(self.pop_many(1)?[0])
    }

    fn top(&self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        ensure!(self.stack.len() > floor, "an object is wanted from an empty stack");
        Ok(self.stack[self.stack.len() - 1])
    }

    fn object(&self, id: Id) -> &Object {
        &self.objects[id as usize]
    }

    fn long(&mut self) -> Result<Object> {
        let [len] = self.array()?;
        ensure!(len <= 8, "an integer of {len} bytes, at most 8 are understood");
        let bytes = self.bytes(len.into())?;
        let sign = bytes.last().is_some_and(|&top| top >= 0x80);
        let mut value = [if sign { 0xff } else { 0 }; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        Ok(Object::Int(i64::from_le_bytes(value)))
    }

    fn append(&mut self, items: &[Id]) -> Result<()> {
        let top = self.top()?;
        match &mut self.objects[top as usize] {
            Object::List(list) => list.extend_from_slice(items),
            other => bail!("items are appended to {}, a list is expected", other.kind()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<()> {
        let top = self.top()?;
        match &mut self.objects[top as usize] {
            Object::Dict(dict) => dict.extend(pairs(items)?),
            other => bail!("items are set in {}, a dict is expected", other.kind()),
        }
        Ok(())
    }

    fn memoize(&mut self, index: u32) -> Result<()> {
        ensure!(self.memo.len() < MAX_OBJECTS, "more than {MAX_OBJECTS} memo entries");
        self.memo.insert(index, self.top()?);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<()> {
        let id = *self.memo.get(&index).with_context(|| format!("memo entry {index} was never written"))?;
        self.push_id(id)
    }

    fn stack_global(&mut self) -> Result<Object> {
        let items = self.pop_many(2)?;
        let (Object::Str(module), Object::Str(name)) = (self.object(items[0]), self.object(items[1])) else {
            bail!("a global is named by two texts");
        };
        global(module, name).map(Object::Global)
    }

    /// `("storage", type, key, device, numbers)` becomes a run of bytes.
    fn persistent_id(&mut self) -> Result<Object> {
        let id = self.pop()?;
        let Object::Tuple(items) = self.object(id) else { bail!("a persistent id is a tuple") };
        let [kind, dtype, key, _device, len] = items[..] else {
            bail!("a persistent id has {} items, 5 are expected", items.len());
        };
        let (Object::Str(kind), Object::Global(Global::Storage(dtype)), Object::Str(key), &Object::Int(len)) =
            (self.object(kind), self.object(dtype), self.object(key), self.object(len))
        else {
            bail!("a persistent id is (\"storage\", type, key, device, length)");
        };
        ensure!(&**kind == "storage", "a persistent id of kind {kind:?}, \"storage\" is expected");
        let range = (self.storage)(key).with_context(|| format!("storage {key:?} is not in the archive"))?;
        let available = range.len() / dtype.bytes();
        let len = usize::try_from(len).ok().filter(|&len| len <= available).with_context(|| {
            format!("storage {key:?} of {len} numbers ({dtype}) in an entry that holds {available}")
        })?;
        Ok(Object::Storage(Storage { dtype: *dtype, start: range.start, len }))
    }

    fn reduce(&mut self) -> Result<()> {
        let items = self.pop_many(2)?;
        let Object::Tuple(arguments) = self.object(items[1]) else { bail!("arguments are a tuple") };
        match self.object(items[0]) {
            Object::Global(Global::OrderedDict) => {
                ensure!(arguments.is_empty(), "an OrderedDict with arguments, none are expected");
                self.push(Object::Dict(Vec::new()))
            }
            Object::Global(Global::RebuildTensor) => {
                let view = self.view(arguments)?;
                self.push(Object::Tensor(Box::new(view)))
            }
            Object::Global(Global::RebuildParameter) => {
                let [data, ..] = arguments[..] else { bail!("a parameter without a tensor") };
                ensure!(matches!(self.object(data), Object::Tensor(_)), "a parameter that is not a tensor");
                self.push_id(data)
            }
            other => bail!("{} is called, nothing of its kind can be", other.kind()),
        }
    }

    /// `(storage, offset, shape, strides, …)`, checked to stay inside the storage.
    fn view(&self, arguments: &[Id]) -> Result<View> {
        let [storage, offset, shape, strides, ..] = arguments[..] else {
            bail!("a tensor of {} arguments, 4 at least are expected", arguments.len());
        };
        let Object::Storage(storage) = *self.object(storage) else { bail!("a tensor without a storage") };
        let offset = self.index(offset)?;
        let (shape, strides) = (self.indices(shape)?, self.indices(strides)?);
        let dims = shape.len();
        ensure!(dims == strides.len(), "a tensor of {dims} dimensions with {} strides", strides.len());
        let outside = || {
            format!(
                "a tensor of shape {shape:?}, strides {strides:?}, offset {offset} in a storage of {} numbers",
                storage.len
            )
        };
        let numbers = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size)).with_context(outside)?;
        let last = shape
            .iter()
            .zip(&strides)
            .try_fold(offset, |last, (&size, &stride)| last.checked_add(size.saturating_sub(1).checked_mul(stride)?));
        let end = if numbers == 0 { Some(offset) } else { last.and_then(|last| last.checked_add(1)) };
        ensure!(end.is_some_and(|end| end <= storage.len), "{} reaches outside", outside());
        ensure!(numbers <= storage.len, "{} repeats numbers", outside());
        let start = storage.start + offset * storage.dtype.bytes();
        Ok(View { dtype: storage.dtype, start, shape, strides })
    }

    fn index(&self, id: Id) -> Result<usize> {
        match *self.object(id) {
            Object::Int(value) => {
                usize::try_from(value).ok().with_context(|| format!("{value} where a size is expected"))
            }
            ref other => bail!("{} where a size is expected", other.kind()),
        }
    }

    fn indices(&self, id: Id) -> Result<Vec<usize>> {
        let Object::Tuple(items) = self.object(id) else { bail!("a shape and strides are tuples") };
        let dims = items.len();
        ensure!(dims <= MAX_DIMENSIONS, "a tensor of {dims} dimensions, at most {MAX_DIMENSIONS} are allowed");
        items.iter().map(|&id| self.index(id)).collect()
    }

    /// State of an `OrderedDict` (a module's `_metadata`): dropped, it says nothing about tensors.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        let target = self.object(self.top()?);
        ensure!(matches!(target, Object::Dict(_)), "state is given to {}, a dict is expected", target.kind());
        Ok(())
    }
}

impl Object {
    /// What it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::Bool(_) => "a truth value",
            Self::Int(_) => "an integer",
            Self::Float(_) => "a number",
            Self::Str(_) => "a text",
            Self::List(_) => "a list",
            Self::Tuple(_) => "a tuple",
            Self::Dict(_) => "a dict",
            Self::Global(_) => "a global",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>> {
    ensure!(items.len().is_multiple_of(2), "{} keys and values, an even number is expected", items.len());
    Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

/// The global `module.name`, if it is one of those that weights are made of.
fn global(module: &str, name: &str) -> Result<Global> {
    let known = match (module, name) {
        ("collections", "OrderedDict") => Some(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
        ("torch", storage) => DType::of_storage(storage).map(Global::Storage),
        _ => None,
    };
    known.with_context(|| {
        let (module, name) = (module.escape_debug(), name.escape_debug());
        format!("the file asks for {module}.{name}, which no weights need: refused, nothing was executed")
    })
}
