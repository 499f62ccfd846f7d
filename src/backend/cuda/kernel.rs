//! Kernels: compiled when they are first launched, or many at once ahead of that.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Result;
use cudarc::driver::sys::CUfunction;
use rayon::prelude::*;

use super::compiler::Compiler;
use super::driver::{Driver, Module};

/// A file with its defines: one module, made once.
struct Code {
    file: String,
    defines: Vec<String>,
    module: OnceCell<Rc<Module>>,
}

/// An entry point; its code may not have been compiled yet.
#[derive(Clone)]
pub(super) struct Kernel(Rc<Entry>);

struct Entry {
    code: Rc<Code>,
    name: String,
    function: OnceCell<CUfunction>, // lives as long as the module of `code`
    compiler: Arc<Compiler>,
    driver: Rc<Driver>,
}

impl Kernel {
    /// Its name in the source.
    pub(super) fn entry(&self) -> &str {
        &self.0.name
    }

    /// What is launched; compiled and loaded now if it has not been.
    pub(super) fn function(&self) -> Result<CUfunction> {
        let Entry { code, name, function, compiler, driver } = &*self.0;
        if let Some(function) = function.get() {
            return Ok(*function);
        }
        if code.module.get().is_none() {
            let _ = code.module.set(driver.module(&compiler.cubin(&code.file, &code.defines)?)?);
        }
        let module = code.module.get().expect("set above");
        let made = module.function(name)?;
        Ok(*function.get_or_init(|| made))
    }
}

/// All kernels of a device.
#[derive(Default)]
pub(super) struct Kernels {
    codes: RefCell<HashMap<Source, Rc<Code>>>,
    entries: RefCell<HashMap<(String, Vec<String>), Kernel>>,
}

/// A file and its defines.
type Source = (String, Vec<String>);

impl Kernels {
    /// Entry point `name` of `file` with `defines`; nothing is compiled yet.
    pub(super) fn kernel(
        &self,
        driver: &Rc<Driver>,
        compiler: &Arc<Compiler>,
        file: &str,
        name: &str,
        defines: Vec<String>,
    ) -> Kernel {
        let key = (name.to_owned(), defines.clone());
        if let Some(kernel) = self.entries.borrow().get(&key) {
            return kernel.clone();
        }
        let mut codes = self.codes.borrow_mut();
        let code = codes.entry((file.to_owned(), defines)).or_insert_with_key(|(file, defines)| {
            Rc::new(Code { file: file.clone(), defines: defines.clone(), module: OnceCell::new() })
        });
        let kernel = Kernel(Rc::new(Entry {
            code: Rc::clone(code),
            name: name.to_owned(),
            function: OnceCell::new(),
            compiler: Arc::clone(compiler),
            driver: Rc::clone(driver),
        }));
        self.entries.borrow_mut().insert(key, kernel.clone());
        kernel
    }

    /// Compiles on all cores what was asked for and is not compiled yet; returns how many files that was.
    pub(super) fn compile(&self, driver: &Rc<Driver>, compiler: &Arc<Compiler>) -> Result<usize> {
        let missing: Vec<Rc<Code>> =
            self.codes.borrow().values().filter(|code| code.module.get().is_none()).cloned().collect();
        let sources: Vec<(&str, &[String])> =
            missing.iter().map(|code| (code.file.as_str(), code.defines.as_slice())).collect();
        let made: Vec<Vec<u8>> =
            sources.par_iter().map(|(file, defines)| compiler.cubin(file, defines)).collect::<Result<_>>()?;
        for (code, cubin) in missing.iter().zip(made) {
            let _ = code.module.set(driver.module(&cubin)?);
        }
        Ok(missing.len())
    }
}
