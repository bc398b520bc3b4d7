
import multiprocessing
def ask():
    exec(open('/tmp/pytest-of-root/pytest-663/test_script_in_the_root_spawne0/ask.py').read())
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=ask)
    child.start()
    child.join()
    raise SystemExit(child.exitcode)
