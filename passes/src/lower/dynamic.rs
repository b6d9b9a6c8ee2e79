//! Products of activations whose range each run chooses: `DynamicQuantizeLinear`, `MatMulInteger`, `Cast`, `Mul`.
//!
//! ONNX Runtime 1.31 makes a `DynamicQuantizeMatMul` of the four. Sums are whole numbers; they are scaled by the product of both scales.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::qdq::{CodesKey, Lowering, bug};
use crate::encoding::{Encoding, Granularity};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::{Attr, Attrs, Node, OpKey, TensorType, Type};
use crate::ops;
use crate::target::LowerError;
use crate::tensor::{DType, Tensor};

/// What a `DynamicQuantizeLinear` returns: codes, scale, zero point.
pub(super) type Quantized = [ValueId; 3];

/// The constants of a weight that is multiplied as integers.
#[derive(Clone, Copy)]
pub(super) struct IntegerWeight {
    codes: ValueId,
    scale: ValueId,
    /// Where it is not 0 everywhere.
    zero_point: Option<ValueId>,
}

/// Those that are written, by codes and encoding.
pub(super) type IntegerWeights = BTreeMap<CodesKey, Vec<(Encoding, IntegerWeight)>>;

impl Lowering<'_> {
    /// Whether the activation of the linear node `id` is encoded by the range of each run.
    pub(super) fn is_dynamic(&self, id: NodeId) -> bool {
        let activation = ops::linear(self.graph, id).map(|roles| roles.activation);
        let encoding = activation.and_then(|input| self.plan.encoding_of_use(self.graph, id, input));
        encoding.is_some_and(|encoding| encoding.granularity == Granularity::Dynamic)
    }

    /// The product `id` on codes.
    pub(super) fn dynamic(&mut self, id: NodeId, node: &Node) -> Result<(), LowerError> {
        let fail = |problem: &str| LowerError { place: format!("node `{}`", node.name), problem: problem.into() };
        let weight_site = Site::Use { node: id, input: 1 };
        let parameters = self.plan.encoding(weight_site).zip(self.plan.codes(weight_site));
        let (encoding, codes) = parameters.ok_or_else(|| fail("its weight has no codes beside dynamic activations"))?;
        let (encoding, codes) = (encoding.clone(), Arc::clone(codes));
        let (Some(activation), Some(weight), Some(output)) = (node.input(0), node.input(1), node.output(0)) else {
            return Err(fail("a product with neither two inputs nor a result"));
        };
        let by_column = matches!(encoding.granularity, Granularity::Axis(1) | Granularity::Tensor);
        let eight_bits = encoding.grid.info().integer && matches!(codes.dtype(), DType::I8 | DType::U8);
        let plain = node.op.is("MatMul") && codes.shape().len() == 2;
        if !(by_column && eight_bits && plain) {
            return Err(fail("dynamic activations take a MatMul by an 8-bit weight of one scale per column"));
        }
        let [quantized, scale, zero_point] = self.dynamic_codes(activation)?;
        let weight = self.integer_weight(weight, &encoding, &codes)?;
        let name = node.name.to_string();
        let shape = self.graph.value(output).ty.tensor().and_then(|ty| ty.shape.clone());
        let typed = |dtype| Type::Tensor(TensorType::new(Some(dtype), shape.clone()));
        let mut inputs = vec![Some(quantized), Some(weight.codes), Some(zero_point)];
        inputs.extend(weight.zero_point.map(Some));
        let sums = self.made("MatMulInteger", &name, inputs, Attrs::new(), typed(DType::I32))?;
        let to = [("to".into(), Attr::Int(i64::from(DType::F32.code())))].into_iter().collect();
        let cast = self.made("Cast", &format!("{name}.cast"), vec![Some(sums)], to, typed(DType::F32))?;
        let inputs = vec![Some(scale), Some(weight.scale)];
        let scales = Type::Tensor(TensorType::known(DType::F32, &encoding.scale_shape(codes.shape())));
        let scales = self.made("Mul", &format!("{name}.scales"), inputs, Attrs::new(), scales)?;
        let inputs = vec![Some(cast), Some(scales)];
        self.node_of("Mul", &format!("{name}.scaled"), inputs, vec![Some(self.raw[&output])], Attrs::new())
    }

    /// Codes, scale and zero point of `value`, computed where they are first asked for.
    fn dynamic_codes(&mut self, value: ValueId) -> Result<Quantized, LowerError> {
        if let Some(quantized) = self.dynamic.get(&value) {
            return Ok(*quantized);
        }
        let source = self.read(value, None)?;
        let name = Arc::clone(&self.graph.value(value).name);
        let shape = self.graph.value(value).ty.tensor().and_then(|ty| ty.shape.clone());
        let kinds = [
            ("codes", TensorType::new(Some(DType::U8), shape)),
            ("scale", TensorType::known(DType::F32, &[])),
            ("zero_point", TensorType::known(DType::U8, &[])),
        ];
        let outputs = kinds.map(|(what, ty)| {
            let id = self.builder.value(&self.fresh(&format!("{name}.{what}")));
            self.builder.set_type(id, Type::Tensor(ty));
            id
        });
        let results = outputs.map(Some).to_vec();
        self.node_of("DynamicQuantizeLinear", &format!("{name}.quantize"), vec![Some(source)], results, Attrs::new())?;
        self.dynamic.insert(value, outputs);
        Ok(outputs)
    }

    /// The constants for the codes and the scale of a weight; products that share both share the constants.
    fn integer_weight(
        &mut self,
        value: ValueId,
        encoding: &Encoding,
        codes: &Arc<Tensor>,
    ) -> Result<IntegerWeight, LowerError> {
        let key = (value, Some(Arc::as_ptr(codes)));
        if let Some((_, found)) = self.integers.get(&key).and_then(|all| all.iter().find(|(e, _)| e == encoding)) {
            return Ok(*found);
        }
        let name = Arc::clone(&self.graph.value(value).name);
        let stem = self.fresh(&format!("{name}.codes"));
        let codes_id = self.builder.constant(&stem, Arc::clone(codes)).map_err(bug)?;
        let (scale, zeros) = self.parameters(&name, encoding, codes.shape())?;
        let zero_point = zeros.filter(|_| !encoding.is_symmetric());
        let weight = IntegerWeight { codes: codes_id, scale, zero_point };
        self.integers.entry(key).or_default().push((encoding.clone(), weight));
        Ok(weight)
    }

    /// The result of a new node, of type `ty`, called like the node.
    fn made(
        &mut self,
        op: &str,
        name: &str,
        inputs: Vec<Option<ValueId>>,
        attrs: Attrs,
        ty: Type,
    ) -> Result<ValueId, LowerError> {
        let output = self.builder.value(&self.fresh(name));
        self.builder.set_type(output, ty);
        self.node_of(op, name, inputs, vec![Some(output)], attrs)?;
        Ok(output)
    }

    fn node_of(
        &mut self,
        op: &str,
        name: &str,
        inputs: Vec<Option<ValueId>>,
        outputs: Vec<Option<ValueId>>,
        attrs: Attrs,
    ) -> Result<(), LowerError> {
        let op = OpKey { domain: "".into(), name: op.into(), opset: self.opset };
        let node = Node { name: name.into(), op, inputs, outputs, attrs, bodies: Vec::new(), notes: None };
        self.builder.node(node).map_err(bug)?;
        Ok(())
    }
}
