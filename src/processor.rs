//! Which instructions the loops use: chosen when the program runs.
//!
//! All paths make the same bits: sums of whole numbers are exact, and sums of f32 run in one order, in which nothing is
//! fused on one path that is not on the others. `DECDEC_CPU` set to
//! one of their names holds the processor to it, for tests and comparisons.

use std::fmt;

/// The name of the variable that holds the processor to a path.
const VARIABLE: &str = "DECDEC_CPU";

/// Instructions that the loops may use. One exists only where the processor has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Path(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// AVX-512 F, BW, DQ and VL with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2, FMA and F16C, with the products of bytes of AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Whatever the target guarantees.
    Scalar,
}

impl Path {
    pub(crate) const SCALAR: Self = Self(Kind::Scalar);

    /// All that this processor has, best first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let mut paths = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if wide {
                paths.push(Self(Kind::Avx512));
            }
            if is_x86_feature_detected!("avxvnni") {
                paths.push(Self(Kind::AvxVnni));
            }
            paths.push(Self(Kind::Avx2));
        }
        paths.push(Self::SCALAR);
        paths.into_iter()
    }

    /// The best that this processor has, or the one that the environment names.
    ///
    /// # Panics
    /// The environment names one that it has not.
    pub(crate) fn detect() -> Self {
        let held = std::env::var(VARIABLE).ok();
        Self::all().find(|path| held.as_ref().is_none_or(|held| path.name() == held)).unwrap_or_else(|| {
            let names: Vec<_> = Self::all().map(Self::name).collect();
            panic!("{VARIABLE} is {held:?}, this processor has {}", names.join(", "))
        })
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }

    /// For device listings.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            Kind::Scalar => "scalar",
        }
    }

    /// True if its products of whole numbers are those of 16-bit numbers.
    pub(crate) fn multiplies_words(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => true,
            _ => false,
        }
    }
}

/// A function that takes a path first, and whose loops are compiled for that path's instructions: they become vectors.
macro_rules! on_every_path {
    ($(#[$doc:meta])* $visible:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $returned:ty)? $body:block) => {
        $(#[$doc])*
        $visible fn $name(path: $crate::processor::Path, $($arg: $type),*) $(-> $returned)? {
            #[inline(always)]
            fn portable($($arg: $type),*) $(-> $returned)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512($($arg: $type),*) $(-> $returned)? {
                portable($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) $(-> $returned)? {
                portable($($arg),*)
            }
            use $crate::processor::Kind;
            match path.kind() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a path exists only where the processor has its instructions.
                Kind::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: likewise.
                Kind::AvxVnni | Kind::Avx2 => unsafe { avx2($($arg),*) },
                Kind::Scalar => portable($($arg),*),
            }
        }
    };
}
pub(crate) use on_every_path;

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
