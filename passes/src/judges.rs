//! Which samples judge what is learned from the others.

use std::collections::BTreeSet;

/// Of so many samples one judges.
const ONE_OF: usize = 8;

/// Whether a sample judges that is the sample `origin`, or a variant of it.
pub(crate) fn is_judge(origin: usize) -> bool {
    origin % ONE_OF == ONE_OF / 2
}

/// The places of those that judge, and of those that are learned from, among samples with these `origins`. Where the origins of the ones
/// or the others are missing, as many are chosen by their order; where there are too few samples for that, none judges.
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
}
