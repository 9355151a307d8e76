//! Records on their way, of all kinds.

use crate::{Bash, Dnsflow, FlowLog, Httpflow, Measurement, Netflow};

/// Records of one flush, grouped by kind so that encoders run over flat slices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecordBatch {
    /// Measurement `netflow`.
    pub netflow: Vec<Netflow>,
    /// Measurement `httpflow`.
    pub httpflow: Vec<Httpflow>,
    /// Measurement `dnsflow`.
    pub dnsflow: Vec<Dnsflow>,
    /// Measurement `bash`.
    pub bash: Vec<Bash>,
    /// Flow logs.
    pub flowlog: Vec<FlowLog>,
}

/// One record of any kind.
#[derive(Clone, Debug, PartialEq)]
pub enum AnyRecord {
    /// Measurement `netflow`.
    Netflow(Netflow),
    /// Measurement `httpflow`.
    Httpflow(Httpflow),
    /// Measurement `dnsflow`.
    Dnsflow(Dnsflow),
    /// Measurement `bash`.
    Bash(Bash),
    /// A flow log.
    FlowLog(Box<FlowLog>),
}

/// The records of a batch, kind by kind.
#[derive(Debug)]
pub struct IntoIter {
    netflow: std::vec::IntoIter<Netflow>,
    httpflow: std::vec::IntoIter<Httpflow>,
    dnsflow: std::vec::IntoIter<Dnsflow>,
    bash: std::vec::IntoIter<Bash>,
    flowlog: std::vec::IntoIter<FlowLog>,
}

// === impl RecordBatch ===

impl RecordBatch {
    /// Number of records of all kinds.
    #[must_use]
    pub fn len(&self) -> usize {
        Measurement::ALL.into_iter().map(|kind| self.count(kind)).sum()
    }

    /// Number of records of one kind.
    #[must_use]
    pub fn count(&self, measurement: Measurement) -> usize {
        match measurement {
            Measurement::Netflow => self.netflow.len(),
            Measurement::Httpflow => self.httpflow.len(),
            Measurement::Dnsflow => self.dnsflow.len(),
            Measurement::Bash => self.bash.len(),
            Measurement::FlowLog => self.flowlog.len(),
        }
    }

    /// True when there is no record of any kind.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a record to those of its kind.
    pub fn push(&mut self, record: AnyRecord) {
        match record {
            AnyRecord::Netflow(record) => self.netflow.push(record),
            AnyRecord::Httpflow(record) => self.httpflow.push(record),
            AnyRecord::Dnsflow(record) => self.dnsflow.push(record),
            AnyRecord::Bash(record) => self.bash.push(record),
            AnyRecord::FlowLog(record) => self.flowlog.push(*record),
        }
    }

    /// Takes all records of one kind out.
    pub fn clear(&mut self, measurement: Measurement) {
        match measurement {
            Measurement::Netflow => self.netflow.clear(),
            Measurement::Httpflow => self.httpflow.clear(),
            Measurement::Dnsflow => self.dnsflow.clear(),
            Measurement::Bash => self.bash.clear(),
            Measurement::FlowLog => self.flowlog.clear(),
        }
    }

    /// Keeps those records for which `keep` says so; it is asked once for each.
    pub fn retain(&mut self, mut keep: impl FnMut() -> bool) {
        let Self {
            netflow,
            httpflow,
            dnsflow,
            bash,
            flowlog,
        } = self;
        netflow.retain(|_| keep());
        httpflow.retain(|_| keep());
        dnsflow.retain(|_| keep());
        bash.retain(|_| keep());
        flowlog.retain(|_| keep());
    }

    /// Gives back room that holds no record.
    pub fn shrink_to_fit(&mut self) {
        self.netflow.shrink_to_fit();
        self.httpflow.shrink_to_fit();
        self.dnsflow.shrink_to_fit();
        self.bash.shrink_to_fit();
        self.flowlog.shrink_to_fit();
    }

    /// Memory of the records' own structs, bytes.
    #[must_use]
    pub fn struct_bytes(&self) -> usize {
        let Self {
            netflow,
            httpflow,
            dnsflow,
            bash,
            flowlog,
        } = self;
        size_of_val(&**netflow)
            + size_of_val(&**httpflow)
            + size_of_val(&**dnsflow)
            + size_of_val(&**bash)
            + size_of_val(&**flowlog)
    }
}

impl IntoIterator for RecordBatch {
    type Item = AnyRecord;
    type IntoIter = IntoIter;

    fn into_iter(self) -> IntoIter {
        IntoIter {
            netflow: self.netflow.into_iter(),
            httpflow: self.httpflow.into_iter(),
            dnsflow: self.dnsflow.into_iter(),
            bash: self.bash.into_iter(),
            flowlog: self.flowlog.into_iter(),
        }
    }
}

// === impl IntoIter ===

impl IntoIter {
    /// What was not taken yet, as a batch.
    #[must_use]
    pub fn into_batch(self) -> RecordBatch {
        RecordBatch {
            netflow: self.netflow.collect(),
            httpflow: self.httpflow.collect(),
            dnsflow: self.dnsflow.collect(),
            bash: self.bash.collect(),
            flowlog: self.flowlog.collect(),
        }
    }
}

impl Iterator for IntoIter {
    type Item = AnyRecord;

    fn next(&mut self) -> Option<AnyRecord> {
        if let Some(record) = self.netflow.next() {
            return Some(AnyRecord::Netflow(record));
        }
        if let Some(record) = self.httpflow.next() {
            return Some(AnyRecord::Httpflow(record));
        }
        if let Some(record) = self.dnsflow.next() {
            return Some(AnyRecord::Dnsflow(record));
        }
        if let Some(record) = self.bash.next() {
            return Some(AnyRecord::Bash(record));
        }
        self.flowlog.next().map(|record| AnyRecord::FlowLog(Box::new(record)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.netflow.len() + self.httpflow.len() + self.dnsflow.len() + self.bash.len() + self.flowlog.len();
        (left, Some(left))
    }
}

impl ExactSizeIterator for IntoIter {}
