//! The font of plots.

use std::sync::Once;

use plotters::style::{FontStyle, register_font};

/// The font comes with the program: servers often have none.
pub(crate) fn use_bundled() {
    static REGISTER: Once = Once::new();
    REGISTER.call_once(|| {
        let regular = register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
        let bold = register_font("sans-serif", FontStyle::Bold, dejavu::sans::bold());
        assert!(regular.is_ok() && bold.is_ok(), "the bundled font is sound");
    });
}
