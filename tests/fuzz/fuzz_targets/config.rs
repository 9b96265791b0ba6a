//! `config.json`: read, and cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secateur::checkpoint::Config;

fuzz_target!(|bytes: &[u8]| {
    let Ok(raw) = serde_json::from_slice(bytes) else { return };
    let Ok(config) = Config::read(raw) else { return };
    let last = config.layer_count as u32 - 1;
    if let Ok(cut) = config.without_layers(&[0, last])
        && config.layer_count > 2
    {
        let again = Config::read(cut).expect("what was cut reads back");
        assert_eq!(again.layers, config.layers[1..config.layer_count - 1]);
    }
});
