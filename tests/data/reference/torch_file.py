"""Reads and writes PyTorch's archives (`torch.save`) without PyTorch: a stored ZIP of one pickle and raw storages.

What `write` makes of what `read` found is the file that was read, byte for byte.
"""

import io
import pickle
import struct
import sys
import types
import zlib
from collections import OrderedDict

import numpy as np

ALIGNMENT = 64
DTYPES = {"HalfStorage": "<f2", "FloatStorage": "<f4", "IntStorage": "<i4", "LongStorage": "<i8"}


class Tensor:
    """A contiguous tensor: what NumPy holds, and the words that PyTorch pickles it with."""

    def __init__(self, storage, values):
        self.storage = storage  # (word "storage", class, key, word "cpu")
        self.values = values

    def __reduce_ex__(self, _):
        shape = self.values.shape
        strides = tuple(int(np.prod(shape[i + 1:])) for i in range(len(shape)))
        return rebuild, (Storage(*self.storage, self.values), 0, shape, strides, False, OrderedDict())


class Storage:
    """Stands where PyTorch pickles a reference to a storage."""

    def __init__(self, word, kind, key, place, values):
        self.parts = (word, kind, key, place)
        self.values = values


def rebuild(storage, offset, shape, strides, _grad, _hooks):
    """`torch._utils._rebuild_tensor_v2`, of contiguous tensors that have a storage to themselves."""
    assert offset == 0 and int(np.prod(shape)) == len(storage.values), "a view"
    tensor = Tensor(storage.parts, storage.values.reshape(shape))
    assert tensor.__reduce_ex__(2)[1][3] == strides, "not contiguous"
    return tensor


def _torch():
    """Modules with PyTorch's names, as far as the pickles name them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in DTYPES:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    torch._utils = utils
    return {"torch": torch, "torch._utils": utils}


sys.modules.update(_torch())


class _Reader(pickle.Unpickler):
    def __init__(self, pickled, records):
        super().__init__(io.BytesIO(pickled))
        self.records = records

    def find_class(self, module, name):
        if module == "collections":
            return OrderedDict
        return getattr(sys.modules[module], name)

    def persistent_load(self, reference):
        word, kind, key, place, count = reference
        values = np.frombuffer(self.records[f"data/{key}"], DTYPES[kind.__name__])
        assert len(values) == count
        return Storage(word, kind, key, place, values)


class _Writer(pickle.Pickler):
    def __init__(self, out):
        super().__init__(out, protocol=2)
        self.storages = {}

    def persistent_id(self, object):
        if not isinstance(object, Storage):
            return None
        word, kind, key, place = object.parts
        data = np.ascontiguousarray(object.values, DTYPES[kind.__name__]).tobytes()
        assert key not in self.storages, "a storage that two tensors share"
        self.storages[key] = data
        return word, kind, key, place, object.values.size


def read(path):
    """The object in a file, and the records beside its pickle and storages."""
    records = {}
    file = path.read_bytes()
    at = 0
    while file[at:at + 4] == b"PK\3\4":
        name_len, extra_len = struct.unpack("<HH", file[at + 26:at + 30])
        start = at + 30 + name_len + extra_len
        name = file[at + 30:at + 30 + name_len].decode().split("/", 1)[1]
        # Sizes stand behind the data, so ask where the next descriptor is that fits.
        end = start
        while True:
            end = file.index(b"PK\7\x08", end)
            crc, size = struct.unpack("<II", file[end + 4:end + 12])
            if size == end - start and zlib.crc32(file[start:end]) == crc:
                break
            end += 1
        records[name] = file[start:end]
        at = end + 16
    root = _Reader(records["data.pkl"], records).load()
    return root, {name: data for name, data in records.items() if not name.startswith("data")}


def write(path, root, others):
    """Writes `root` as PyTorch 2 does, with the version and identity that `others` hold."""
    pickled = io.BytesIO()
    writer = _Writer(pickled)
    writer.dump(root)
    records = {"data.pkl": pickled.getvalue()}
    late = ["version", ".data/serialization_id"]
    records |= {name: data for name, data in others.items() if name not in late}
    records |= {f"data/{key}": data for key, data in sorted(writer.storages.items(), key=lambda item: int(item[0]))}
    records |= {name: others[name] for name in late}
    out, directory = bytearray(), bytearray()
    for name, data in records.items():
        name = f"{path.stem}/{name}".encode()
        entry = len(out)
        # An extra field of at least four bytes brings the data to the alignment.
        padding = -(entry + 30 + len(name) + 4) % ALIGNMENT
        fixed = struct.pack("<HHHHH", 0, 0x808, 0, 0, 0)
        out += b"PK\3\4" + fixed + struct.pack("<IIIHH", 0, 0, 0, len(name), padding + 4)
        out += name + b"FB" + struct.pack("<H", padding) + b"Z" * padding + data
        sizes = struct.pack("<III", zlib.crc32(data), len(data), len(data))
        out += b"PK\7\x08" + sizes
        directory += b"PK\1\2" + struct.pack("<H", 0) + fixed + sizes
        directory += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, entry) + name
    start, count = len(out), len(records)
    end = start + len(directory)
    out += directory
    out += b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 0x31E, 45, 0, 0, count, count, len(directory), start)
    out += b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
    out += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(out)
