//! Number formats, code by code, against the tables of another implementation (fixtures/formats).

use passes::grid;

/// Name, what every code stands for (`None`: NaN), and numbers with the codes they round to.
type Format = (String, Vec<Option<f32>>, Vec<(f32, u32)>);

fn table() -> Vec<Format> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/formats/ml_dtypes.txt");
    let text = std::fs::read_to_string(path).unwrap();
    let float = |hex: &str| f32::from_bits(u32::from_str_radix(hex, 16).unwrap());
    let mut formats: Vec<Format> = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        match words.next() {
            Some("format") => formats.push((words.next().unwrap().to_owned(), Vec::new(), Vec::new())),
            Some("codes") => {
                formats.last_mut().unwrap().1 = words.map(|w| (w != "-").then(|| float(w))).collect();
            }
            Some("round") => {
                let pair = |w: &str| w.split_once(':').map(|(x, c)| (float(x), u32::from_str_radix(c, 16).unwrap()));
                formats.last_mut().unwrap().2 = words.filter_map(pair).collect();
            }
            _ => {}
        }
    }
    formats
}

#[test]
fn every_code_stands_for_the_same_number_as_in_ml_dtypes() {
    let formats = table();
    assert_eq!(formats.len(), 15);
    for (name, codes, _) in formats.into_iter().filter(|(name, ..)| name != "e8m0") {
        let grid = grid::find(&name).unwrap();
        for (code, want) in (0_u32..).zip(codes) {
            let value = grid.decode(code);
            match want {
                None => assert!(value.is_nan(), "{name} {code:#x}"),
                Some(want) => {
                    assert_eq!(value.to_bits(), f64::from(want).to_bits(), "{name} {code:#x}: {value} {want}");
                    if want.is_finite() {
                        assert_eq!(grid.encode(value), code, "{name} {value}");
                    }
                }
            }
        }
    }
}

/// Scales of MX formats: every code, the smallest of which is a subnormal number, and the one that is none.
#[test]
fn exponents_without_mantissa_are_those_of_ml_dtypes() {
    use passes::trt::{e8m0, from_e8m0};
    let (_, codes, _) = table().into_iter().find(|(name, ..)| name == "e8m0").unwrap();
    assert_eq!(codes.len(), 256);
    for (code, want) in (0_u8..=255).zip(codes) {
        match want {
            None => assert!(from_e8m0(code).is_nan(), "{code}"),
            Some(want) => {
                assert_eq!(from_e8m0(code).to_bits(), want.to_bits(), "{code}");
                assert_eq!(e8m0(&[want]), Some(vec![code]));
            }
        }
    }
    for none in [3.0, -1.0, 0.0, f32::INFINITY, f32::NAN, f32::from_bits(1), f32::from_bits(0x0060_0000)] {
        assert_eq!(e8m0(&[none]), None, "{none}");
    }
}

/// Midpoints go to even, and the numbers next to them to the nearer side; by `nearest` and by `snap`.
#[test]
fn rounding_is_that_of_ml_dtypes() {
    for (name, _, probes) in table().into_iter().filter(|(.., probes)| !probes.is_empty()) {
        let grid = grid::find(&name).unwrap();
        for (x, code) in probes {
            let want = grid.decode(code);
            let nearest = grid.nearest(f64::from(x));
            assert!((nearest - want).abs() < 1e-12, "{name} {x}: {nearest} {want}");
            let mut snapped = [x];
            grid.snap(&mut snapped, 0.0);
            assert!((f64::from(snapped[0]) - want).abs() < 1e-12, "{name} {x}: {snapped:?} {want}");
        }
    }
}

/// A minifloat with one exponent bit is an integer in sign and magnitude.
#[test]
fn one_exponent_bit_is_an_integer_grid() {
    for (name, step, top) in [("e1m1", 1.0, 3), ("e1m2", 0.5, 7), ("e1m4", 0.125, 31), ("e1m6", 0.03125, 127)] {
        let grid = grid::find(name).unwrap();
        for k in -top..=top {
            let point = f64::from(k) * step;
            assert!((grid.nearest(point) - point).abs() < 1e-12, "{name} {k}");
        }
        assert!((grid.range().1 - f64::from(top) * step).abs() < 1e-12);
    }
}

/// What lies between −0 and the first number below keeps its sign, as `QuantizeLinear` and `ml_dtypes` have it.
#[test]
fn a_negative_zero_keeps_its_sign_in_codes() {
    use passes::encoding::Encoding;
    let encoding = Encoding::per_tensor(grid::find("float8e4m3fn").unwrap(), 1.0, 0);
    let codes = encoding.encode(&[-1e-4, 1e-4], &[2]).unwrap();
    assert_eq!(codes.bytes().as_ref(), [0x80, 0x00]);
}
