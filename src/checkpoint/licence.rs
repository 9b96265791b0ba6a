//! The licence of a model, as its directory tells it: it goes wherever the weights go.

use std::fs;
use std::path::Path;

/// Keys of a model card's front matter that speak of the licence.
const KEYS: [&str; 3] = ["license", "license_name", "license_link"];
/// Far above any real card.
const MAX_CARD_BYTES: usize = 1 << 20;

/// Lines for the front matter of a card made from that of `dir`: its own words, or where it has none but a file, a
/// pointer to that.
#[must_use]
pub fn licence(dir: &Path) -> Vec<String> {
    let card = fs::read(dir.join("README.md")).unwrap_or_default();
    let card = String::from_utf8_lossy(&card[..card.len().min(MAX_CARD_BYTES)]).into_owned();
    let mut lines = card.lines();
    let front: Vec<&str> = match lines.next() {
        Some("---") => lines.take_while(|line| *line != "---").collect(),
        _ => Vec::new(),
    };
    let said = front.into_iter().filter(|line| {
        let value = KEYS.iter().find_map(|key| line.strip_prefix(key)?.strip_prefix(':'));
        // A list or a text of several lines stays behind.
        value.is_some_and(|value| !matches!(value.trim(), "" | "|" | ">"))
    });
    let said: Vec<String> = said.map(String::from).collect();
    if !said.is_empty() {
        return said;
    }
    let file = ["LICENSE", "LICENSE.txt", "LICENSE.md"].into_iter().find(|name| dir.join(name).is_file());
    file.map(|name| vec!["license: other".into(), format!("license_link: {name}")]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_licence_is_told_by_the_card_or_by_its_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(licence(dir.path()).is_empty());
        fs::write(dir.path().join("LICENSE"), "text").unwrap();
        assert_eq!(licence(dir.path()), ["license: other", "license_link: LICENSE"]);
        let card = "---\nlanguage: en\nlicense: llama3.1\nlicense_name:\n---\nlicense: no\n";
        fs::write(dir.path().join("README.md"), card).unwrap();
        assert_eq!(licence(dir.path()), ["license: llama3.1"]);
    }
}
