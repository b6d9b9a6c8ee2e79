//! Operators of older opsets, said in opset 21 with the semantics they had.
//!
//! One function per kind of change. What has no exact form in opset 21 is refused by name; operators that only gained types
//! or neutral options pass as they are.

use std::sync::Arc;

use passes::id::ValueId;
use passes::ir::{Attr, Attrs, BuildError, Builder, Node, OpKey, Type};
use passes::tensor::{DType, Tensor};

use super::{TARGET_OPSET, name};

/// Why a node was not added.
#[derive(Debug)]
pub(super) enum Problem {
    /// It has no exact form in opset 21.
    Refused(String),
    /// The graph refuses it.
    Build(BuildError),
}

impl From<BuildError> for Problem {
    fn from(error: BuildError) -> Self {
        Self::Build(error)
    }
}

type Done = Result<(), Problem>;

fn refuse<T>(problem: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Refused(problem.into()))
}

/// Adds `node`, converted to opset 21 where its ai.onnx version is older.
pub(super) fn add(builder: &mut Builder, mut node: Node) -> Done {
    let from = node.op.opset;
    if !node.op.domain.is_empty() || from > TARGET_OPSET {
        builder.node(node)?;
        return Ok(());
    }
    node.op.opset = TARGET_OPSET;
    let mut upgrade = Upgrade { builder, from };
    let op = Arc::clone(&node.op.name);
    match &*op {
        "Softmax" | "LogSoftmax" | "Hardmax" if from < 13 => upgrade.softmax(node),
        "ReduceL1" | "ReduceL2" | "ReduceLogSum" | "ReduceLogSumExp" | "ReduceMax" | "ReduceMean" | "ReduceMin"
        | "ReduceProd" | "ReduceSumSquare"
            if from < 18 =>
        {
            upgrade.axes_to_input(node, true)
        }
        "Squeeze" | "ReduceSum" if from < 13 => upgrade.axes_to_input(node, true),
        "Unsqueeze" if from < 13 => upgrade.axes_to_input(node, false),
        "Split" if from < 18 => upgrade.split(node),
        "Slice" if from < 10 => upgrade.slice(node),
        "TopK" if from < 10 => upgrade.top_k(node),
        "Pad" if from < 11 => upgrade.pad(node),
        "Clip" if from < 11 => upgrade.clip(node),
        "Upsample" => upgrade.upsample(node),
        "Resize" if from < 11 => upgrade.resize_10(node),
        "Resize" if from < 21 => upgrade.resize(node),
        "Scatter" => upgrade.renamed(node, "ScatterElements"),
        "Scan" if from < 9 => refuse("Scan before opset 9 scans batches; export the model for opset 9 or newer"),
        "BatchNormalization" if from < 14 => upgrade.batch_norm(node),
        "Dropout" if from < 12 => upgrade.dropout(node),
        "RoiAlign" if from < 16 => upgrade.with_default(node, "coordinate_transformation_mode", "output_half_pixel"),
        "GridSample" if from < 20 => upgrade.grid_sample(node),
        "DFT" if from < 20 => upgrade.dft(node),
        "GroupNormalization" if from < 21 => upgrade.group_norm(node),
        "QuantizeLinear" if from < 19 => upgrade.quantize(node),
        _ => upgrade.keep(node),
    }
}

struct Upgrade<'a> {
    builder: &'a mut Builder,
    from: u32,
}

impl Upgrade<'_> {
    fn keep(&mut self, node: Node) -> Done {
        self.builder.node(node)?;
        Ok(())
    }

    fn renamed(&mut self, mut node: Node, op: &str) -> Done {
        node.op.name = name(op);
        self.keep(node)
    }

    fn constant(&mut self, stem: &str, tensor: Tensor) -> Result<ValueId, Problem> {
        let fresh = self.builder.fresh(stem);
        Ok(self.builder.constant(&fresh, Arc::new(tensor))?)
    }

    fn ints(&mut self, node: &Node, what: &str, values: &[i64]) -> Result<Option<ValueId>, Problem> {
        let stem = format!("{}.{what}", self.stem(node));
        self.constant(&stem, Tensor::of([values.len()], values.to_vec())).map(Some)
    }

    /// What to call things made for `node`: its first output.
    fn stem(&self, node: &Node) -> String {
        node.output(0).map_or_else(|| node.name.to_string(), |value| self.builder.get(value).name.to_string())
    }

    /// Adds a new node of one output beside `like`, and returns the output.
    fn helper(
        &mut self,
        like: &Node,
        op: &str,
        inputs: Vec<Option<ValueId>>,
        attrs: Attrs,
    ) -> Result<ValueId, Problem> {
        let fresh = self.builder.fresh(&format!("{}.{}", self.stem(like), op.to_lowercase()));
        let output = self.builder.value(&fresh);
        self.builder.node(Node {
            name: format!("{}.{}", like.name, op.to_lowercase()).into(),
            op: OpKey { domain: name(""), name: name(op), opset: TARGET_OPSET },
            inputs,
            outputs: vec![Some(output)],
            attrs,
            bodies: Vec::new(),
            notes: None,
        })?;
        Ok(output)
    }

    fn rank(&self, value: Option<ValueId>) -> Option<usize> {
        self.builder.get(value?).ty.rank()
    }

    fn dtype(&self, value: Option<ValueId>) -> Option<DType> {
        self.builder.get(value?).ty.dtype()
    }

    fn constant_of(&self, value: Option<ValueId>) -> Option<Arc<Tensor>> {
        match &self.builder.get(value?).def {
            passes::ir::Def::Const(tensor) => Some(Arc::clone(tensor)),
            _ => None,
        }
    }

    /// `axes` moves from an attribute to input 1; where `empty_is_all`, none means all and the input is left out.
    fn axes_to_input(&mut self, mut node: Node, empty_is_all: bool) -> Done {
        let axes = match node.attrs.remove("axes") {
            Some(Attr::Ints(axes)) => axes,
            _ => Vec::new(),
        };
        node.inputs.truncate(1);
        if !(axes.is_empty() && empty_is_all) {
            let axes = self.ints(&node, "axes", &axes)?;
            node.inputs.push(axes);
        }
        self.keep(node)
    }

    /// Before opset 13 the input was first flattened to two dimensions at `axis`, 1 by default.
    fn softmax(&mut self, mut node: Node) -> Done {
        let axis = node.int("axis", 1);
        let last = self.rank(node.input(0)).and_then(|rank| i64::try_from(rank).ok()).map(|rank| rank - 1);
        if axis == -1 || Some(axis) == last {
            node.attrs.insert(name("axis"), Attr::Int(-1));
            return self.keep(node);
        }
        let input = node.input(0);
        let shape = self.helper(&node, "Shape", vec![input], Attrs::new())?;
        let flat = self.helper(&node, "Flatten", vec![input], [(name("axis"), Attr::Int(axis))].into())?;
        let op = Arc::clone(&node.op.name);
        let result = self.helper(&node, &op, vec![Some(flat)], [(name("axis"), Attr::Int(-1))].into())?;
        node.op.name = name("Reshape");
        node.inputs = vec![Some(result), Some(shape)];
        node.attrs = [(name("allowzero"), Attr::Int(1))].into();
        self.keep(node)
    }

    fn split(&mut self, mut node: Node) -> Done {
        if let Some(Attr::Ints(sizes)) = node.attrs.remove("split") {
            let sizes = self.ints(&node, "split", &sizes)?;
            node.inputs.truncate(1);
            node.inputs.push(sizes);
        } else if node.input(1).is_none() {
            let count = i64::try_from(node.outputs.len()).unwrap_or(i64::MAX);
            node.attrs.insert(name("num_outputs"), Attr::Int(count));
        }
        self.keep(node)
    }

    fn slice(&mut self, mut node: Node) -> Done {
        let mut list = |what: &str| match node.attrs.remove(what) {
            Some(Attr::Ints(values)) => Some(values),
            _ => None,
        };
        let (Some(starts), Some(ends), axes) = (list("starts"), list("ends"), list("axes")) else {
            return refuse("starts and ends are missing");
        };
        let axes = axes.unwrap_or_else(|| (0..i64::try_from(starts.len()).unwrap_or(0)).collect());
        node.inputs.truncate(1);
        for (what, values) in [("starts", starts), ("ends", ends), ("axes", axes)] {
            let value = self.ints(&node, what, &values)?;
            node.inputs.push(value);
        }
        self.keep(node)
    }

    fn top_k(&mut self, mut node: Node) -> Done {
        let Some(Attr::Int(k)) = node.attrs.remove("k") else { return refuse("k is missing") };
        let k = self.ints(&node, "k", &[k])?;
        node.inputs.truncate(1);
        node.inputs.push(k);
        self.keep(node)
    }

    fn pad(&mut self, mut node: Node) -> Done {
        let Some(Attr::Ints(pads)) = node.attrs.remove("pads") else { return refuse("pads is missing") };
        let value = node.float("value", 0.0);
        node.attrs.remove("value");
        let pads = self.ints(&node, "pads", &pads)?;
        node.inputs.truncate(1);
        node.inputs.push(pads);
        if value != 0.0 && node.text("mode", "constant") == "constant" {
            let value = self.scalar_like(&node, "value", value)?;
            node.inputs.push(Some(value));
        }
        self.keep(node)
    }

    fn clip(&mut self, mut node: Node) -> Done {
        let bounds = [("min", f32::MIN), ("max", f32::MAX)].map(|(what, open)| match node.attrs.remove(what) {
            // The default was the largest f32, whatever the element type: for f32 and f16 that is no bound at all.
            Some(Attr::Float(bound)) if bound.to_bits() != open.to_bits() => Some((what, bound)),
            _ => None,
        });
        node.inputs.truncate(1);
        for bound in bounds {
            let input = match bound {
                Some((what, bound)) => Some(self.scalar_like(&node, what, bound)?),
                None => None,
            };
            node.inputs.push(input);
        }
        while node.inputs.last().is_some_and(Option::is_none) {
            node.inputs.pop();
        }
        self.keep(node)
    }

    /// A scalar of the element type of input 0, cast where that is not known yet.
    fn scalar_like(&mut self, node: &Node, what: &str, value: f32) -> Result<ValueId, Problem> {
        let stem = format!("{}.{what}", self.stem(node));
        let Some(dtype) = self.dtype(node.input(0)) else {
            let float = self.constant(&stem, Tensor::scalar(value))?;
            return self.helper(node, "CastLike", vec![Some(float), node.input(0)], Attrs::new());
        };
        let tensor = match dtype {
            DType::F32 => Tensor::scalar(value),
            DType::F64 => Tensor::scalar(f64::from(value)),
            DType::F16 => {
                let clamped = half::f16::from_f32(value.clamp(-65504.0, 65504.0));
                let bytes = bytes::Bytes::copy_from_slice(&clamped.to_le_bytes());
                Tensor::new(DType::F16, Vec::new(), bytes).map_err(|e| Problem::Refused(e.to_string()))?
            }
            other => return refuse(format!("its {what} for elements of type {} has no exact form", other.name())),
        };
        self.constant(&stem, tensor)
    }

    /// `Upsample` is `Resize` with asymmetric coordinates, nearest rounded down.
    fn upsample(&mut self, mut node: Node) -> Done {
        let scales = match node.attrs.remove("scales") {
            Some(Attr::Floats(scales)) => {
                let stem = format!("{}.scales", self.stem(&node));
                Some(self.constant(&stem, Tensor::of([scales.len()], scales))?)
            }
            _ => node.input(1),
        };
        self.resized(node, scales, "floor")
    }

    /// The first `Resize` had no coordinate modes: asymmetric, nearest rounded down when growing and up when shrinking.
    fn resize_10(&mut self, node: Node) -> Done {
        let scales = node.input(1);
        let nearest = node.text("mode", "nearest") == "nearest";
        let known = self.constant_of(scales).and_then(|t| t.floats().map(std::borrow::Cow::into_owned));
        let rounding = match known {
            _ if !nearest => "floor",
            Some(scales) if scales.iter().all(|&s| s >= 1.0) => "floor",
            Some(scales) if scales.iter().all(|&s| s <= 1.0) => "ceil",
            Some(_) => {
                return refuse("a nearest Resize of opset 10 that grows and shrinks has no exact form in opset 21");
            }
            None => return refuse("a nearest Resize of opset 10 needs constant scales"),
        };
        self.resized(node, scales, rounding)
    }

    fn resized(&mut self, mut node: Node, scales: Option<ValueId>, rounding: &str) -> Done {
        node.op.name = name("Resize");
        node.inputs = vec![node.input(0), None, scales];
        node.attrs.insert(name("coordinate_transformation_mode"), Attr::text("asymmetric"));
        node.attrs.insert(name("nearest_mode"), Attr::text(rounding));
        self.keep(node)
    }

    /// Empty `roi` and `scales` are left out; the one mode that opset 13 removed is said with another where it is the same.
    fn resize(&mut self, mut node: Node) -> Done {
        for input in [1, 2] {
            if self.constant_of(node.input(input)).is_some_and(|t| t.is_empty()) {
                node.inputs[input] = None;
            }
        }
        if node.text("coordinate_transformation_mode", "half_pixel") == "tf_half_pixel_for_nn" {
            let same =
                node.text("mode", "nearest") == "nearest" && node.text("nearest_mode", "round_prefer_floor") == "floor";
            if !same {
                return refuse("coordinate mode tf_half_pixel_for_nn has an exact form only for nearest, rounded down");
            }
            node.attrs.insert(name("coordinate_transformation_mode"), Attr::text("half_pixel"));
            node.attrs.insert(name("nearest_mode"), Attr::text("round_prefer_ceil"));
        }
        self.keep(node)
    }

    fn batch_norm(&mut self, mut node: Node) -> Done {
        let spatial = match node.attrs.remove("spatial") {
            Some(Attr::Int(spatial)) => spatial != 0,
            _ => true,
        };
        if !spatial && self.from < 9 {
            return refuse("normalizing every position by itself (spatial=0) has no form in opset 21");
        }
        node.outputs.truncate(1); // the others were for training only
        self.keep(node)
    }

    /// At inference the first result is the input.
    fn dropout(&mut self, mut node: Node) -> Done {
        node.attrs.clear();
        node.inputs.truncate(1);
        let mask = node.output(1);
        node.outputs.truncate(1);
        if let Some(mask) = mask {
            // Runtimes returned a mask of false before opset 12.
            let shape = self.helper(&node, "Shape", vec![node.input(0)], Attrs::new())?;
            let no = Tensor::new(DType::Bool, vec![1], bytes::Bytes::from_static(&[0]));
            let no = if self.from < 10 { Ok(Tensor::of([1], vec![0.0_f32])) } else { no };
            let no = no.map_err(|e| Problem::Refused(e.to_string()))?;
            let attrs = [(name("value"), Attr::Tensor(Arc::new(no)))].into();
            self.keep(Node {
                name: format!("{}.mask", node.name).into(),
                op: OpKey { name: name("ConstantOfShape"), ..node.op.clone() },
                inputs: vec![Some(shape)],
                outputs: vec![Some(mask)],
                attrs,
                bodies: Vec::new(),
                notes: None,
            })?;
        }
        self.renamed(node, "Identity")
    }

    fn with_default(&mut self, mut node: Node, attribute: &str, value: &str) -> Done {
        node.attrs.entry(name(attribute)).or_insert_with(|| Attr::text(value));
        self.keep(node)
    }

    fn grid_sample(&mut self, mut node: Node) -> Done {
        let mode = match node.text("mode", "bilinear") {
            "bilinear" => "linear",
            "bicubic" => "cubic",
            other => other,
        };
        let mode = Attr::text(mode);
        node.attrs.insert(name("mode"), mode);
        self.keep(node)
    }

    fn dft(&mut self, mut node: Node) -> Done {
        let axis = node.int("axis", 1);
        node.attrs.remove("axis");
        let stem = format!("{}.axis", self.stem(&node));
        let axis = self.constant(&stem, Tensor::scalar(axis))?;
        node.inputs.resize(2, None);
        node.inputs.push(Some(axis));
        self.keep(node)
    }

    /// Scale and bias were per group, and are per channel now.
    fn group_norm(&mut self, mut node: Node) -> Done {
        let groups = node.int("num_groups", 0);
        if groups <= 0 || node.inputs.len() < 3 {
            return refuse("num_groups, scale or bias is missing");
        }
        let one = self.ints(&node, "one", &[1])?;
        let shape = self.helper(
            &node,
            "Shape",
            vec![node.input(0)],
            [(name("start"), Attr::Int(1)), (name("end"), Attr::Int(2))].into(),
        )?;
        let groups = self.ints(&node, "groups", &[groups])?;
        let per_group = self.helper(&node, "Div", vec![Some(shape), groups], Attrs::new())?;
        let repeat = self.helper(&node, "Concat", vec![one, Some(per_group)], [(name("axis"), Attr::Int(0))].into())?;
        for input in [1, 2] {
            let column = self.ints(&node, "column", &[-1, 1])?;
            let row = self.ints(&node, "row", &[-1])?;
            let column = self.helper(&node, "Reshape", vec![node.input(input), column], Attrs::new())?;
            let wide = self.helper(&node, "Expand", vec![Some(column), Some(repeat)], Attrs::new())?;
            node.inputs[input] = Some(self.helper(&node, "Reshape", vec![Some(wide), row], Attrs::new())?);
        }
        self.keep(node)
    }

    /// Before opset 19 the scale of a quantized integer tensor was a float of its own.
    fn quantize(&mut self, mut node: Node) -> Done {
        if self.dtype(node.input(0)) == Some(DType::I32) {
            let float = [(name("to"), Attr::Int(DType::F32.code().into()))].into();
            let cast = self.helper(&node, "Cast", vec![node.input(0)], float)?;
            self.builder.set_type(cast, Type::default());
            node.inputs[0] = Some(cast);
        }
        self.keep(node)
    }
}
