//! The WGSL kernels, as the device layer needs to know them.

/// Text that precedes every kernel.
const FLOATS: &str = include_str!("../../../kernels-wgsl/floats.wgsl");

/// Text that follows the products.
const PRODUCTS: &str = include_str!("../../../kernels-wgsl/products.wgsl");

/// Bytes of the uniform buffer from which the products take their input.
pub(super) const UNIFORM_BYTES: usize = 65_536;

/// One kernel: its bindings are `reads` buffers that it reads, then `writes` that it may also write.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Stem of the file and entry point.
    pub(super) name: &'static str,
    source: &'static str,
    pub(super) reads: usize,
    pub(super) writes: usize,
    /// Which of `reads` is a uniform buffer of [`UNIFORM_BYTES`].
    pub(super) uniform: Option<usize>,
    /// Words of its immediate parameters.
    pub(super) parameters: usize,
}

impl Kernel {
    /// Everything that is compiled.
    pub(super) fn text(&self) -> String {
        [FLOATS, self.source, if self.uniform.is_some() { PRODUCTS } else { "" }].concat()
    }
}

macro_rules! kernels {
    ($($constant:ident $name:literal $reads:literal $writes:literal $uniform:expr, $parameters:literal;)*) => {
        $(pub(super) static $constant: Kernel = Kernel {
            name: $name,
            source: include_str!(concat!("../../../kernels-wgsl/", $name, ".wgsl")),
            reads: $reads,
            writes: $writes,
            uniform: $uniform,
            parameters: $parameters,
        };)*
        /// Every kernel.
        #[cfg(test)]
        static ALL: &[&Kernel] = &[$(&$constant),*];
    };
}

kernels! {
    // constant     name           reads writes uniform parameters
    GEMV_ANYPREC    "gemv_anyprec" 4     1      Some(3), 9;
    GEMV_LUTGEMM    "gemv_lutgemm" 5     1      Some(4), 9;
    GEMV_DENSE      "gemv_dense"   3     1      Some(2), 9;
    DEC_SELECT      "dec_select"   2     1      None,    4;
    DEC_APPLY       "dec_apply"    4     1      None,    7;
    RMS_NORM        "rms_norm"     2     1      None,    2;
    EMBED           "embed"        2     1      None,    6;
    NORM_QK         "norm_qk"      2     1      None,    6;
    ROPE            "rope"         2     1      None,    5;
    ATTEND          "attend"       3     1      None,    10;
    ROUND_BYTES     "round_bytes"  0     2      None,    3;
    APPEND          "append"       1     2      None,    6;
    APPEND_BYTES    "append_bytes" 2     2      None,    6;
    GATED           "gated"        1     1      None,    2;
    ADD_NORM        "add_norm"     2     1      None,    2;
    SOFTCAP         "softcap"      0     1      None,    2;
    ARGMAX          "argmax"       1     1      None,    2;
}

#[cfg(test)]
mod tests {
    use naga::valid::{Capabilities, ValidationFlags, Validator};
    use naga::{AddressSpace, StorageAccess};

    use super::*;

    /// Every kernel is valid, has the entry point of its name, and the bindings of the table in its order.
    #[test]
    fn shaders_validate() {
        for kernel in ALL {
            let name = kernel.name;
            let text = kernel.text();
            let module =
                naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&text)));
            let info = Validator::new(
                ValidationFlags::all(),
                Capabilities::IMMEDIATES | Capabilities::SHADER_FLOAT16_IN_FLOAT32,
            )
            .validate(&module);
            info.unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&text)));
            assert_eq!(module.entry_points.len(), 1, "{name}");
            assert_eq!(module.entry_points[0].name, name);

            let mut bindings = Vec::new();
            for (_, global) in module.global_variables.iter() {
                match global.space {
                    AddressSpace::Storage { access } => {
                        let writes = access.contains(StorageAccess::STORE);
                        bindings.push((global.binding.unwrap().binding as usize, writes));
                    }
                    AddressSpace::Uniform => {
                        let binding = global.binding.unwrap().binding as usize;
                        assert_eq!(kernel.uniform, Some(binding), "{name}");
                        bindings.push((binding, false));
                        let size = module.types[global.ty].inner.size(module.to_ctx()) as usize;
                        assert_eq!(size, UNIFORM_BYTES, "{name}");
                    }
                    AddressSpace::Immediate => {
                        let naga::TypeInner::Struct { span, .. } = module.types[global.ty].inner else {
                            panic!("{name}: parameters are no struct");
                        };
                        assert_eq!(span as usize, 4 * kernel.parameters, "{name}");
                    }
                    _ => {}
                }
            }
            let want: Vec<_> = (0..kernel.reads + kernel.writes).map(|i| (i, i >= kernel.reads)).collect();
            assert_eq!(bindings, want, "{name}");
        }
    }
}
