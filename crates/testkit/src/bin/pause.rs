//! Holds the namespaces of a pod in test clusters: waits until it is killed.

fn main() {
    loop {
        std::thread::park();
    }
}
