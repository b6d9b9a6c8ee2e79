//! Which samples are held out from learning, to judge what it comes to.

use std::collections::BTreeSet;

/// Of so many samples one judges.
const ONE_OF: usize = 8;

/// Whether sample `origin` is a judge; its variants go with it.
pub fn is_judge(origin: usize) -> bool {
    origin % ONE_OF == ONE_OF / 2
}

/// The places, in order, of `room` samples spread over all those with these `origins`, with as large a share of judges as there is, and one
/// at least where there is room for another one beside it.
pub(crate) fn chosen(origins: &[usize], room: usize) -> Vec<usize> {
    let all = origins.len();
    if room >= all {
        return (0..all).collect();
    }
    let (judges, fitted): (Vec<usize>, Vec<usize>) = (0..all).partition(|&at| is_judge(origins[at]));
    let least = usize::from(room > 1 && !judges.is_empty());
    let share = (room * judges.len() / all.max(1)).clamp(least, judges.len()).max(room.saturating_sub(fitted.len()));
    let spread = |from: &[usize], n: usize| (0..n).map(|i| from[i * from.len() / n]).collect::<Vec<_>>();
    let mut places = [spread(&judges, share), spread(&fitted, room - share)].concat();
    places.sort_unstable();
    places
}

/// The places of those that judge, and of those that are learned from, among samples with these `origins`. Where all or none of them are
/// judges, every eighth origin of those present is, in their order; where there are too few for that, none.
pub(crate) fn split(origins: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let by = |of: &dyn Fn(usize) -> usize| (0..origins.len()).partition(|&at| is_judge(of(origins[at])));
    let (judges, fitted): (Vec<usize>, Vec<usize>) = by(&|origin| origin);
    if !judges.is_empty() && !fitted.is_empty() {
        return (judges, fitted);
    }
    let distinct: Vec<usize> = origins.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    by(&|origin| distinct.binary_search(&origin).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_judge_where_their_sample_does() {
        // Six samples, and two variants of each.
        let origins: Vec<usize> = (0..18).map(|at| at % 6).collect();
        assert_eq!(split(&origins), (vec![4, 10, 16], vec![0, 1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 17]));
    }

    #[test]
    fn someone_judges_where_there_are_enough() {
        assert_eq!(split(&[0, 8, 16, 24, 32]), (vec![4], vec![0, 1, 2, 3]), "every eighth of many");
        assert_eq!(split(&[4, 12]), (vec![], vec![0, 1]), "only those that would judge");
        assert_eq!(split(&[0, 1, 2]), (vec![], vec![0, 1, 2]));
        assert_eq!(split(&[]), (vec![], vec![]));
    }

    /// Whatever there is room for, about an eighth of it judges, and nobody who was not meant to.
    #[test]
    fn fewer_samples_keep_their_judges() {
        for (samples, variants) in [(128, 0), (128, 4), (32, 4), (5, 0), (12, 1)] {
            let origins: Vec<usize> = (0..samples * (variants + 1)).map(|at| at % samples).collect();
            for room in 0..=origins.len() + 1 {
                let places = chosen(&origins, room);
                assert_eq!(places.len(), room.min(origins.len()));
                assert!(places.is_sorted_by(|a, b| a < b), "{samples}, {room}: {places:?}");
                if room > 1 {
                    let judges = places.iter().filter(|&&at| is_judge(origins[at])).count();
                    let most = (origins.len().min(room) / 4).max(1);
                    assert!((1..=most).contains(&judges), "{samples}, {variants}, {room}: {judges} judge");
                }
            }
        }
        assert_eq!(chosen(&[0, 1, 2], 2), [0, 1], "no judges");
        assert_eq!(chosen(&[4, 12, 20], 2).len(), 2, "only judges");
    }
}
