//! The comparison as a picture: skiff's median over each reference's, one bar each.

use std::path::Path;

use plotters::prelude::*;
use serde_json::Value;

/// Draws the ratios.
pub fn draw(path: &Path, results: &[Value]) -> Result<(), Box<dyn std::error::Error>> {
    let bars: Vec<(String, f64)> = results
        .iter()
        .filter(|one| one["who"] != "skiff" && (one["unit"] == "ms" || one["unit"] == "KiB"))
        .filter(|one| !one["who"].as_str().unwrap_or_default().starts_with("at "))
        .filter_map(|one| {
            Some((format!("{} / {}", one["what"].as_str()?, one["who"].as_str()?), one["ratio"].as_f64()?))
        })
        .collect();
    let height = 60 + 26 * bars.len() as u32;
    let root = SVGBackend::new(path, (900, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = bars.iter().map(|bar| bar.1).fold(1.0, f64::max);
    let text = ("sans-serif", 13).into_font();
    root.draw_text(
        "skiff's median over the reference's (shorter is better; the line is 1)",
        &text.clone().color(&BLACK),
        (10, 10),
    )?;
    let scale = 380.0 / most;
    for (at, (name, ratio)) in bars.iter().enumerate() {
        let top = 36 + 26 * at as i32;
        root.draw_text(name, &text.clone().color(&BLACK), (10, top + 3))?;
        let end = 440 + (ratio * scale) as i32;
        let color = if *ratio <= 1.0 { RGBColor(46, 125, 110) } else { RGBColor(176, 82, 60) };
        root.draw(&Rectangle::new([(440, top), (end.max(442), top + 18)], color.filled()))?;
        root.draw_text(&format!("{ratio:.2}"), &text.clone().color(&BLACK), (end + 6, top + 3))?;
    }
    let one = 440 + scale as i32;
    root.draw(&PathElement::new([(one, 32), (one, height as i32 - 8)], BLACK))?;
    root.present()?;
    Ok(())
}
